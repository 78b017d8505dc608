"""The `vllm.general_plugins` entry point: inert unless LVLLM_MOE_NUMA_ENABLED=1.

vLLM calls `register` in every process it starts, and may call it more than once in one process.
"""

import multiprocessing
import os

import vllm
from packaging.version import InvalidVersion, Version

import lvllm
from lvllm import api_key
from lvllm.errors import LvllmError
from lvllm.faults import crashes, leaving, orphans, process
from lvllm.settings import variables
from lvllm.supported import VLLM


def register() -> None:
    """Give vLLM LvLLM's layers through its seams, and replace what has no seam.

    A wrong setting, or a vLLM that is not as the replacements expect, ends a command with one line
    and exit code 1. In a program that uses vLLM as a library, it raises LvllmError with that line.
    """
    with process.refusing():
        if variables.enabled(os.environ):
            _register()


def _register() -> None:
    _check_vllm()
    from lvllm.settings.resolving import resolve

    resolve(os.environ, None)  # the variables alone, before any configuration is read
    if multiprocessing.parent_process() is None:
        api_key.hide()
    orphans.end_with_the_parent()
    leaving.leave_after_the_work()
    crashes.end_at_once_on_a_crash()

    from vllm.platforms import current_platform

    from lvllm import patches
    from lvllm.loading import gguf_loader
    from lvllm.upstream import (
        expert_layers,
        integer_linear,
        quantization_configs,
        ray_variables,
        request_log,
    )

    if current_platform.is_unspecified():
        raise LvllmError(
            f"vLLM {vllm.__version__} is not built for CPUs, and finds no GPU here: `nvidia-smi`"
            " must list one; for a machine without, install the build for CPUs"
            " (VLLM_TARGET_DEVICE=cpu)"
        )
    # On a GPU vLLM's own linear layers, routers and pictures run.
    is_cpu = current_platform.is_cpu()
    expert_layers.register()
    quantization_configs.register()
    gguf_loader.register()
    ray_variables.copy_ours()
    request_log.hide_requests()
    if is_cpu:
        integer_linear.register()
    patches.install("cpu" if is_cpu else "cuda")


def _check_vllm() -> None:
    """Raise LvllmError for a release of vLLM that LvLLM does not run with."""
    try:
        version = Version(vllm.__version__)
    except InvalidVersion:
        return  # This is vLLM's source, whose functions are checked one by one.
    least, most = (Version(known).release[:2] for known in (VLLM[0], VLLM[-1]))
    if not least <= version.release[:2] <= most:
        raise LvllmError(
            f"vLLM {version} is installed, and LvLLM {lvllm.__version__} runs with"
            f" {VLLM[0]} to {VLLM[-1]}: install one of these, or unset LVLLM_MOE_NUMA_ENABLED for"
            " stock vLLM"
        )
