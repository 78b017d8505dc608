"""Feeds the readers of files, settings and tensors with inputs that a fuzzing engine makes up.

    python -m tests.fuzz 3600                  # all targets, 3600 seconds in total
    python -m tests.fuzz 3600 gguf_files       # one target
    python -m tests.fuzz gguf_files FILE       # one input again, with its traceback

With the same number in the environment variable FUZZ_SEED, two runs try the same inputs in the same
order; the target `lk` draws its own.

A target is a module of tests/fuzz/targets. Its function one_input(data) must end as
tests/fuzz/rules.py says. The fuzzing engine is atheris (libFuzzer), which sees what branches of
`lvllm` an input takes. It starts from tests/fuzz/corpus and from what earlier runs have left in
build/fuzz. The target `lk` is csrc/lk/fuzz_test.cpp, built with AddressSanitizer and
UndefinedBehaviorSanitizer.
"""

import importlib
import os
import re
import subprocess
import sys
import time
from contextlib import redirect_stderr
from pathlib import Path
from typing import NoReturn

from tests.fuzz import rules
from tests.fuzz.inputs import CORPUS, TARGETS

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "fuzz"
LK = "lk"
LK_TEST = ROOT / "build" / "tests-asan" / "csrc" / "lk" / "lk_test"
SEED = os.environ.get("FUZZ_SEED", "0")
"""0: another one each time."""
MOST_SECONDS = 10
"""Of one input, while other processes take the CPU. The slowest inputs that are allowed take one
second by themselves."""
MOST_BYTES = 4096
"""Of one input. Each kind of damage fits in, and longer inputs are slower."""


def main(arguments: list[str]) -> int:
    match arguments:
        case [seconds] if seconds.isdigit():
            return _fuzz_all([*TARGETS, LK], int(seconds))
        case [seconds, target] if seconds.isdigit() and target in (*TARGETS, LK):
            return _fuzz_all([target], int(seconds))
        case [target, file] if target in TARGETS:
            with rules.bounded():
                _target(target)(Path(file).read_bytes())
            return 0
    print(f"{__doc__}\ntargets: {', '.join((*TARGETS, LK))}", file=sys.stderr)
    return 2


def _fuzz_all(targets: list[str], seconds: int) -> int:
    """Give each target its share of the time. The exit code is 1 if one of them failed."""
    end = time.monotonic() + seconds
    BUILD.mkdir(parents=True, exist_ok=True)
    if targets != [LK]:
        _import_targets([target for target in targets if target != LK])
    passed = []
    for number, target in enumerate(targets):
        share = max(1, int((end - time.monotonic()) / (len(targets) - number)))
        passed.append(_fuzz_lk(share) if target == LK else _fuzz(target, share))
    return 0 if all(passed) else 1


def _import_targets(targets: list[str]) -> None:
    """Import targets, and let atheris follow the branches of `lvllm`.

    This happens once, before a process is forked for each target: torch alone takes seconds.
    """
    import atheris

    with (
        (BUILD / "imports.log").open("w") as log,
        redirect_stderr(log),
        atheris.instrument_imports(include=["lvllm"]),
    ):
        for target in targets:
            _target(target)


def _fuzz(target: str, seconds: int) -> bool:
    """Fuzz one target in a process of its own. Returns whether all inputs passed."""
    log = BUILD / f"{target}.log"
    failures = BUILD / "failures" / target
    failures.mkdir(parents=True, exist_ok=True)
    before = set(failures.iterdir())
    sys.stdout.flush()
    if (process := os.fork()) == 0:
        with log.open("w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        _run_forked(target, seconds, failures)
    _, status = os.waitpid(process, 0)
    text = log.read_text(errors="replace")
    counts = re.findall(r"^(?:#|Done )(\d+)", text, re.MULTILINE)
    print(f"{target}: {max(map(int, counts), default=0)} inputs in {seconds} s", flush=True)
    if status == 0:
        return True
    print(text[-6000:])
    print(f"{target}: failed; all of its output is in {log.relative_to(ROOT)}")
    for file in sorted(set(failures.iterdir()) - before):
        print(f"again: {sys.executable} -m tests.fuzz {target} {file.relative_to(ROOT)}")
    return False


def _run_forked(target: str, seconds: int, failures: Path) -> NoReturn:
    """The life of a target's process."""
    import atheris

    one_input = _target(target)

    def checked(data: bytes) -> None:
        try:
            with rules.bounded():
                one_input(data)
        except BaseException:
            # libFuzzer writes inputs that crash or hang, but none that raise.
            (failures / f"error-{time.time_ns():x}").write_bytes(data)
            raise

    found = BUILD / "corpus" / target
    found.mkdir(parents=True, exist_ok=True)
    options = {
        "seed": SEED,
        "max_total_time": seconds,
        "timeout": MOST_SECONDS,
        "max_len": MOST_BYTES,
        "rss_limit_mb": 4096,
        "artifact_prefix": f"{failures}/",
    }
    arguments = [f"-{name}={value}" for name, value in options.items()]
    try:
        atheris.Setup([target, *arguments, str(found), str(CORPUS / target)], checked)
        atheris.Fuzz()  # It ends the process.
    finally:
        os._exit(1)


def _fuzz_lk(seconds: int) -> bool:
    """Run the C++ fuzz test, which prints its seed and what it did."""
    if not LK_TEST.exists():
        print(f"{LK}: {LK_TEST.relative_to(ROOT)} is missing: make test-asan builds it")
        return False
    environment = os.environ | {"LK_FUZZ_SECONDS": str(seconds)}
    command = [str(LK_TEST), "--gtest_filter=Fuzz.*", "--gtest_brief=1"]
    return subprocess.run(command, env=environment).returncode == 0


def _target(name: str) -> rules.Target:
    target: rules.Target = importlib.import_module(f"tests.fuzz.targets.{name}").one_input
    return target


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
