"""What PyTorch needs on this machine to compile C++ for CPUs, as vLLM's compiled mode does."""

import os
import shutil
import sysconfig
from pathlib import Path

__all__ = ["lacking"]


def lacking() -> str | None:
    """What is not installed, with the package that has it; None where PyTorch can compile."""
    program = os.environ.get("CXX") or "g++"
    if shutil.which(program) is None:
        return f"there is no C++ compiler ({program}; Debian, Ubuntu: apt install g++)"
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").is_file():
        return f"{headers} has no Python.h (Debian, Ubuntu: apt install python3-dev)"
    return None
