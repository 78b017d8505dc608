"""Runs one step of the tests and timings on a machine with a GPU.

    python3 -m tests.gpu.on_device.step NUMBER [FOLDER]

Each step takes less than 8 minutes. It prints a line for each command, then the ends of the logs
that are to be read, and leaves all logs in FOLDER/step-NUMBER.tar.gz; FOLDER is $OUT or build/gpu.
The exit status is 1 if a command failed. A machine needs a CUDA GPU, PyTorch for CUDA, CMake,
Ninja, a C++ compiler and the packages that the first step names. It needs no network, and no vLLM
before step 3; `tests/gpu/on_device/pack.py` packs that, and pydantic, which step 2 wants.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[3]
PYTHON = sys.executable
TEST = f"{PYTHON} -m pytest -q --confcutdir=tests/gpu/on_device -p no:cacheprovider"
SMALL = "-k 'cuda and (streamed_against_float32 or many_layers)'"
SERVE = f"{PYTHON} -m benchmarks.gpu_serving"


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


STEPS: dict[int, tuple[Command, ...]] = {
    1: (
        Command("machine", 60, f"{PYTHON} -m tests.gpu.on_device.machine", shown=40),
        Command("build", 240, f"{PYTHON} -m build_tools.engine"),
        Command("lane", 240, f"{TEST} tests/gpu/on_device/test_offload.py", shown=10),
        # compute-sanitizer slows kernels down a hundredfold, so it gets one small pass.
        Command(
            "memcheck",
            150,
            f"compute-sanitizer --error-exitcode 1 {TEST} tests/gpu/on_device/test_offload.py"
            f" {SMALL}",
            shown=5,
            wants="compute-sanitizer",
        ),
        Command("engine", 120, f"{TEST} tests/engine/test_expert_layer.py -x", shown=3),
    ),
    2: (
        Command("host", 60, f"{PYTHON} -m benchmarks.gpu_machine", shown=30),
        Command(
            "lane",
            240,
            f"{PYTHON} -m benchmarks.gpu_offload --formats bf16,int4 --prefill 512,8192",
            shown=60,
        ),
        Command(
            "lk",
            150,
            f"{PYTHON} -m benchmarks.moe_block --format bf16,int8,int4 --tokens 1,16,512",
            shown=40,
        ),
    ),
    3: (
        Command("import", 60, f"{PYTHON} -m tests.gpu.on_device.machine vllm", shown=10),
        Command("serving", 400, f"{TEST} tests/gpu/on_device/test_serving.py -x", shown=40),
    ),
    4: (
        Command(
            "whole",
            440,
            f"{SERVE} --layers 48 --prefill 8192 --decode 1,4 --repeats 1 --timeout 200"
            " --only 'no layers,half layers,half the,all prefetched' --json {logs}/serving.json",
            shown=12,
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
    log, begin = logs / f"{command.name.replace(' ', '-')}.log", time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            ["bash", "-c", command.line.replace("{logs}", str(logs))],
            cwd=ROOT,
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
        print(f"FAILED    {took}, status {code}:", *lines[-40:], sep="\n", flush=True)
    return code == 0


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments or not arguments[0].isdigit() or int(arguments[0]) not in STEPS:
        raise SystemExit(f"wanted the number of a step, 1 to {len(STEPS)}, and a folder for logs")
    number = int(arguments[0])
    folder = Path(arguments[1] if len(arguments) > 1 else os.environ.get("OUT", "build/gpu"))
    logs = Path("build", "gpu", f"step-{number}").absolute()
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True)
    folder.mkdir(parents=True, exist_ok=True)
    passed = {command.name: run(command, logs) for command in STEPS[number]}
    for command in STEPS[number]:
        log = logs / f"{command.name.replace(' ', '-')}.log"
        if command.shown and passed[command.name] and log.exists():
            lines = log.read_text(errors="replace").splitlines()
            print(f"\n{command.name}", *lines[-command.shown :], sep="\n")
    with tarfile.open(folder / f"step-{number}.tar.gz", "w:gz") as archive:
        archive.add(logs, logs.name)
    failed = [name for name, good in passed.items() if not good]
    print(f"\nstep {number}, failed: {', '.join(failed) or 'none'}")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
