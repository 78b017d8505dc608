"""Runs one step of the tests and timings on a machine with a GPU.

    python3 -m tests.gpu.on_device.step NUMBER [FOLDER]

Each step takes less than 8 minutes. It prints a line for each command, then the ends of the logs
that are to be read. Logs are in FOLDER/step-NUMBER from the first line on, so that a step that is
cut off leaves what it knows; FOLDER is $OUT or build/gpu. The exit status is 1 if a command failed.
A machine needs a CUDA GPU, PyTorch for CUDA, the packages that the first step names, and CMake,
Ninja and a C++ compiler, unless lvllm/engine/_engine.so was built elsewhere and loads there. It
needs no network, and no vLLM before step 3; `tests/gpu/on_device/pack.py` packs it, and what step 1
names.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[3]
PYTHON = sys.executable
TEST = f"{PYTHON} -m pytest -q --confcutdir=tests/gpu/on_device -p no:cacheprovider"
SMALL = "-k 'cuda and (streamed_against_float32 or many_layers)'"
SERVE = f"{PYTHON} -m benchmarks.gpu_serving"
LOADS = "'from lvllm import engine; print(engine.info().isa, \"as it was built\")'"


@dataclass(frozen=True)
class Command:
    """A command of a step."""

    name: str
    seconds: int
    """Its limit."""
    line: str
    """What the shell runs, in the root of the repository."""
    shown: int = 0
    """How many lines of its log are printed at the end of the step."""
    wants: str = ""
    """A program without which the command is left out."""
    beside: bool = False
    """Whether it runs beside the command before it."""


STEPS: dict[int, tuple[Command, ...]] = {
    1: (
        Command("machine", 60, f"{PYTHON} -m tests.gpu.on_device.machine", shown=40),
        Command("build", 240, f"{PYTHON} -c {LOADS} || {PYTHON} -m build_tools.engine"),
        # It compiles the kernels for most of its time, and so it has four processes.
        Command("lane", 240, f"{TEST} -n 4 tests/gpu/on_device/test_offload.py", shown=10),
        Command("engine", 240, f"{TEST} tests/engine/test_expert_layer.py -x", 3, beside=True),
        # compute-sanitizer slows kernels down a hundredfold, so it gets one small pass.
        Command(
            "memcheck",
            150,
            f"compute-sanitizer --error-exitcode 1 {TEST} tests/gpu/on_device/test_offload.py"
            f" {SMALL}",
            shown=5,
            wants="compute-sanitizer",
        ),
    ),
    2: (
        Command("host", 60, f"{PYTHON} -m benchmarks.gpu_machine", shown=30),
        Command(
            "lane",
            240,
            f"{PYTHON} -m benchmarks.gpu_offload --formats bf16,int4 --prefill 512,8192",
            shown=60,
        ),
        *(
            Command(
                f"lk {format}",
                50,
                f"{PYTHON} -m benchmarks.moe_block --format {format} --tokens 1,16,512",
                shown=14,
            )
            for format in ("int4", "bf16", "int8")
        ),
    ),
    3: (
        Command("import", 60, f"{PYTHON} -m tests.gpu.on_device.machine vllm", shown=10),
        # Three of vLLM's processes are on the GPU at a time: a start is little work for it.
        Command(
            "serving",
            400,
            f"LOGS={{logs}} {TEST} -vv -n 3 tests/gpu/on_device/test_serving.py",
            shown=40,
        ),
    ),
    4: (
        Command(
            "four layers",
            120,
            f"{SERVE} --layers 4 --prefill 8192 --decode 1 --repeats 1 --timeout 110"
            " --only 'no layers' --json {logs}/four-layers.json",
            shown=6,
        ),
        Command(
            "whole",
            340,
            f"{SERVE} --layers 48 --prefill 8192 --decode 1,4 --repeats 1 --timeout 170"
            " --only 'no layers,half layers,half the,all prefetched' --json {logs}/serving.json",
            shown=16,
        ),
    ),
    5: (
        Command(
            "long prompts",
            440,
            f"{SERVE} --layers 48 --prefill 32768 --decode 1 --repeats 1 --timeout 200"
            " --only 'all layers,all by' --json {logs}/serving.json",
            shown=12,
        ),
    ),
}


def run(command: Command, logs: Path) -> bool:
    """Run a command with its output in a log. Print a line, and return whether it succeeded."""
    if command.wants and not shutil.which(command.wants):
        print(f"left out  {command.name}: there is no {command.wants}", flush=True)
        return True
    log, begin = log_of(command, logs), time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            ["bash", "-c", command.line.replace("{logs}", str(logs))],
            cwd=ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},  # Each line is in the log at once.
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # The command's processes are ended with it.
        )
        try:
            code = process.wait(command.seconds)
        except subprocess.TimeoutExpired:
            code = -1
            file.write(f"\nnot done after {command.seconds} s\n")
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    lines = log.read_text(errors="replace").splitlines() or ["(no output)"]
    took = f"{command.name} ({time.monotonic() - begin:.0f} s)"
    if code == 0:
        print(f"passed    {took}: {lines[-1]}", flush=True)
    else:
        print(f"FAILED    {took}, status {code}:\n" + "\n".join(lines[-40:]), flush=True)
    return code == 0


def log_of(command: Command, logs: Path) -> Path:
    return logs / f"{command.name.replace(' ', '-')}.log"


def run_all(commands: Sequence[Command], logs: Path) -> dict[str, bool]:
    """Run commands one after the other, or beside each other where they say so."""
    together: list[list[Command]] = []
    for command in commands:
        if command.beside:
            together[-1].append(command)
        else:
            together.append([command])
    passed: dict[str, bool] = {}
    for some in together:
        with ThreadPoolExecutor(len(some)) as threads:
            good = threads.map(run, some, [logs] * len(some))
            passed |= zip((command.name for command in some), good, strict=True)
    return passed


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments or not arguments[0].isdigit() or int(arguments[0]) not in STEPS:
        raise SystemExit(f"wanted the number of a step, 1 to {len(STEPS)}, and a folder for logs")
    number = int(arguments[0])
    folder = Path(arguments[1] if len(arguments) > 1 else os.environ.get("OUT", "build/gpu"))
    logs = Path(folder, f"step-{number}").absolute()
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True)
    passed = run_all(STEPS[number], logs)
    for command in STEPS[number]:
        log = log_of(command, logs)
        if command.shown and passed[command.name] and log.exists():
            lines = log.read_text(errors="replace").splitlines()
            print(f"\n{command.name}", *lines[-command.shown :], sep="\n")
    failed = [name for name, good in passed.items() if not good]
    print(f"\nstep {number}, failed: {', '.join(failed) or 'none'}")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
