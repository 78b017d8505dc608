"""Set up the checkout's virtual environment and show each step. Parts that are up to date stay.

`python3 -m build_tools.bootstrap --venv .venv [--tools NAME]...` needs only Python and g++.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import time
import tomllib
from pathlib import Path

from build_tools.engine import find_compiler
from build_tools.errors import PREFIX, BuildError
from build_tools.lay_in import TREE
from build_tools.pip_errors import explain
from build_tools.record import STAMP
from build_tools.target import ROOT, lvllm_version, select_target

LOG = ROOT / "build" / "setup.log"

# Where the output is no terminal, a long step prints a line every so many seconds.
HEARTBEAT = 20

# The files of requirements/ that `--tools` takes.
TOOLS = ("test", "lint", "fuzz", "wheel", "docs")


class Steps:
    """Runs commands one after another. A line for each says what it does and how long it took."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.number = 0
        self.terminal = sys.stdout.isatty()
        LOG.parent.mkdir(exist_ok=True)
        LOG.write_text("")

    def run(self, what: str, command: list[str]) -> None:
        """Run a command with its output in build/setup.log. Raises BuildError if it fails."""
        self.number += 1
        title = f"[{self.number}/{self.total}] {what}"
        print(title, end=" " if self.terminal else " ...\n", flush=True)
        start = time.monotonic()
        offset = LOG.stat().st_size
        with LOG.open("a") as log:
            process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
            while process.poll() is None:
                self._wait(process, title, start)
        seconds = time.monotonic() - start
        done = "failed" if process.returncode else "done"
        start_of_line = f"\r{title}" if self.terminal else "   "
        print(f"{start_of_line} {done} in {seconds:.0f} s", flush=True)
        if process.returncode != 0:
            output = LOG.read_text()[offset:]
            raise BuildError(f"{reason(output)} (log: {LOG.relative_to(ROOT)})")

    def _wait(self, process: subprocess.Popen[bytes], title: str, start: float) -> None:
        try:
            process.wait(1 if self.terminal else HEARTBEAT)
        except subprocess.TimeoutExpired:
            seconds = f"{time.monotonic() - start:.0f} s"
            if self.terminal:
                print(f"\r{title} {seconds}", end="", flush=True)
            else:
                print(f"    ... {seconds}", flush=True)


def reason(output: str) -> str:
    """Why a step failed: the build's own error line if it printed one, else the gist of pip's."""
    _, prefix, ours = output.rpartition(PREFIX)
    return ours.splitlines()[0] if prefix else explain(output)


class Venv:
    """The virtual environment. A file in it says what each part of it was set up from."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.python = path / "bin" / "python"
        self._stamps = path / "lvllm-setup.json"

    def works(self) -> bool:
        """True if the environment exists, has this Python, and runs pip."""
        probe = "import sys, pip; print(sys.version)"
        if not self.python.exists():
            return False
        result = subprocess.run([self.python, "-c", probe], capture_output=True, text=True)
        return result.stdout.strip() == sys.version

    def is_fresh(self, part: str, inputs: str) -> bool:
        """True if `part` was last set up from the same `inputs`."""
        return self._read().get(part) == inputs

    def stamp(self, part: str, inputs: str) -> None:
        """Remember that `part` is set up from these `inputs`."""
        self._stamps.write_text(json.dumps(self._read() | {part: inputs}))

    def _read(self) -> dict[str, str]:
        return json.loads(self._stamps.read_text()) if self._stamps.exists() else {}


def distribution_inputs(target: str) -> str:
    """A hash of everything that decides what is installed, except the engine's sources."""
    files = [ROOT / "setup.py", ROOT / "pyproject.toml", *ROOT.glob("build_tools/*.py")]
    names = ("build", "lvllm", "upstream", "webui")
    files += [ROOT / "requirements" / f"{name}.txt" for name in names]
    parts = [str(ROOT), target, lvllm_version(), *(file.read_text() for file in sorted(files))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def set_up(venv: Venv, tool_sets: list[str]) -> None:
    """Bring the environment up to date, with requirements/<name>.txt of each of `tool_sets`.

    Raises BuildError.
    """
    target = select_target()
    find_compiler()
    create = not venv.works()
    inputs = distribution_inputs(target)
    laid_in = (TREE / STAMP).exists()
    install = create or not laid_in or not venv.is_fresh("distribution", inputs)
    tools = {name: (ROOT / "requirements" / f"{name}.txt").read_text() for name in tool_sets}
    if not create:
        tools = {name: text for name, text in tools.items() if not venv.is_fresh(name, text)}

    pip = [str(venv.python), "-m", "pip", "--disable-pip-version-check", "install"]
    tool_files = [part for name in tools for part in ("-r", f"requirements/{name}.txt")]
    steps = Steps(1 + create + 4 * install + (bool(tools) and not install))
    if create:
        command = [sys.executable, "-m", "venv", "--clear", str(venv.path)]
        steps.run(f"creating {venv.path.name} with Python {sys.version.split()[0]}", command)
    if install:
        requirements = ROOT / "build" / f"requirements-{target}.txt"
        steps.run("installing the build tools", [*pip, *_build_system_requires()])
        steps.run(
            f"fetching upstream vLLM ({target})", [str(venv.python), "-m", "build_tools.upstream"]
        )
        with requirements.open("w") as file:
            subprocess.run([venv.python, "-m", "build_tools.metadata"], stdout=file, check=True)
        # Compiling every module to bytecode takes 32 of 73 CPU seconds, and most modules are never
        # imported.
        files = ["--no-compile", "-r", str(requirements), *tool_files]
        steps.run("installing PyTorch and vLLM's requirements", [*pip, *files])
        editable = ["--no-build-isolation", "--no-deps", "-e", "."]
        steps.run("building and installing LvLLM", [*pip, *editable])
        venv.stamp("distribution", inputs)
    elif tools:
        steps.run(f"installing the tools for {' and '.join(tools)}", [*pip, *tool_files])
    steps.run("building the engine", [str(venv.python), "-m", "build_tools.engine"])
    for name, text in tools.items():
        venv.stamp(name, text)


def _build_system_requires() -> list[str]:
    return list(tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"])


def main() -> None:
    """Parse the command line and set up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--tools", action="append", default=[], choices=TOOLS)
    arguments = parser.parse_args()
    try:
        import ensurepip  # noqa: F401
    except ImportError:
        raise BuildError(
            "this Python cannot make a virtual environment with pip "
            "(Debian, Ubuntu: apt install python3-venv)"
        ) from None
    try:
        set_up(Venv(arguments.venv.absolute()), arguments.tools)
    except KeyboardInterrupt:
        raise BuildError("interrupted; the same command goes on where it stopped") from None


if __name__ == "__main__":
    main()
