"""The `vllm.general_plugins` entry point: inert unless LVLLM_MOE_NUMA_ENABLED=1.

vLLM calls `register` in every process it starts, and may call it more than once in one.
"""

import os

from lvllm.errors import LvllmError
from lvllm.settings import variables


def register() -> None:
    """Put LvLLM's expert layer in the place of vLLM's, and check every configuration.

    An unusable setting ends the process with one line and exit code 1: SystemExit, since vLLM
    prints any other exception as a traceback.
    """
    try:
        if not variables.enabled(os.environ):
            return
        from lvllm.settings.resolving import resolve

        resolve(os.environ, None)  # the variables alone, before any configuration is read
    except variables.SettingError as error:
        raise SystemExit(f"lvllm: {error}") from None
    from vllm.platforms import current_platform

    from lvllm import patches
    from lvllm.faults import process
    from lvllm.loading import model_loader
    from lvllm.patches import lora, segments
    from lvllm.upstream import quantization_configs

    _replace_routed_experts()
    process.install()
    lora.register()
    quantization_configs.register()
    model_loader.install()
    segments.register()
    if current_platform.is_cpu():
        _complete_cpu_platform()
    try:
        patches.install("cpu" if current_platform.is_cpu() else "cuda")
    except LvllmError as error:
        raise SystemExit(f"lvllm: {error}") from None


def _complete_cpu_platform() -> None:
    """What vLLM's CPU platform lacks, and its others have or have no part in: on a GPU its own
    linear layers, routers and pictures run. Its worker for GPUs is its own, so no step's output
    tells of faults there.
    """
    from lvllm.faults import request
    from lvllm.patches import collectives, picture_steps, pictures, routing
    from lvllm.upstream import fp8_linear, integer_linear

    collectives.register()
    request.register()
    fp8_linear.register()
    integer_linear.register()
    picture_steps.register()
    pictures.register()
    routing.register()


def _replace_routed_experts() -> None:
    from vllm.model_executor.custom_op import op_registry_oot

    from lvllm.moe.routed_experts import REPLACED

    for upstream, ours in REPLACED.items():
        if upstream.__name__ not in op_registry_oot:
            upstream.register_oot(ours)
