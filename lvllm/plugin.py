"""The `vllm.general_plugins` entry point: inert unless LVLLM_MOE_NUMA_ENABLED=1.

vLLM calls `register` in every process it starts, and may call it more than once in one process.
"""

import os

from lvllm.errors import LvllmError
from lvllm.settings import variables


def register() -> None:
    """Give vLLM LvLLM's layers through its seams, and replace what has no seam.

    A wrong setting, or a vLLM that is not as the replacements expect, ends the process with one
    line and exit code 1. The error is SystemExit, since vLLM prints any other exception as a
    traceback.
    """
    try:
        if variables.enabled(os.environ):
            _register()
    except LvllmError as error:
        raise SystemExit(f"lvllm: {error}") from None


def _register() -> None:
    from lvllm.settings.resolving import resolve

    resolve(os.environ, None)  # the variables alone, before any configuration is read

    from vllm.platforms import current_platform

    from lvllm import patches
    from lvllm.upstream import expert_layers, integer_linear, quantization_configs

    # On a GPU vLLM's own linear layers, routers and pictures run.
    is_cpu = current_platform.is_cpu()
    expert_layers.register()
    quantization_configs.register()
    if is_cpu:
        integer_linear.register()
    patches.install("cpu" if is_cpu else "cuda")
