"""The `vllm.general_plugins` entry point: inert unless LVLLM_MOE_NUMA_ENABLED=1.

vLLM calls `register` in every process it starts, and may call it more than once in one.
"""

import os
from typing import Any

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

    from lvllm.faults import process
    from lvllm.loading import model_loader
    from lvllm.patches import lora, segments
    from lvllm.prefill import client as prefill_engine
    from lvllm.upstream import quantization_configs

    _replace_routed_experts()
    _check_every_configuration()
    process.install()
    lora.register()
    quantization_configs.register()
    model_loader.install()
    segments.register()
    prefill_engine.subordinate()
    if current_platform.is_cpu():
        _complete_cpu_platform()


def _complete_cpu_platform() -> None:
    """What vLLM's CPU platform lacks, and its others have or have no part in: on a GPU its own
    linear layers, routers and pictures run. Its worker for GPUs is its own, so no step's output
    tells of faults there.
    """
    from lvllm.faults import request
    from lvllm.patches import collectives, picture_steps, pictures, routing
    from lvllm.upstream import fp8_linear, integer_linear

    _allow_experts_without_gate()
    collectives.register()
    request.register()
    fp8_linear.register()
    integer_linear.register()
    picture_steps.register()
    pictures.register()
    routing.register()


def _replace_routed_experts() -> None:
    from vllm.model_executor.custom_op import op_registry_oot
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    from lvllm.moe.routed_experts import REPLACED

    for upstream, ours in REPLACED.items():
        if upstream.__name__ not in op_registry_oot:
            upstream.register_oot(ours)
    # Registration goes by class name, so any other subclass is not replaced. Its experts would run
    # on vLLM's kernels, unsaid.
    RoutedExperts._get_quant_method = _only_if_resident


def _only_if_resident(layer: Any, prefix: str, quant_config: Any, moe_config: Any) -> Any:
    from lvllm.moe.routed_experts import is_resident, resident_method

    if is_resident(prefix):
        return resident_method(layer, prefix, quant_config, moe_config)
    raise ValueError(
        f"{prefix}: experts of the class {type(layer).__name__} are not supported with"
        " LVLLM_MOE_NUMA_ENABLED=1 yet; unset it for stock vLLM"
    )


def _allow_experts_without_gate() -> None:
    """vLLM refuses them on the CPU, whose kernels have none; the engine's have.

    The refusal is the last thing that a configuration of experts does when it is made.
    """
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig

    upstream = FusedMoEConfig.__post_init__
    if upstream.__module__ == __name__:
        return

    def __post_init__(self: FusedMoEConfig) -> None:
        try:
            upstream(self)
        except NotImplementedError:
            if self.is_act_and_mul:
                raise

    FusedMoEConfig.__post_init__ = __post_init__  # type: ignore[method-assign]


def _check_every_configuration() -> None:
    """Run our checks right after the platform's own, the last of vLLM's that may change values.

    vLLM offers no hook between the complete configuration and the start of its processes; the
    platform's class method is the narrowest place that every way of starting passes.
    """
    from vllm.platforms import current_platform

    from lvllm import prepare
    from lvllm.checkpoint.headers import CheckpointError

    platform = type(current_platform)
    upstream = platform.check_and_update_config
    if getattr(upstream, "__func__", upstream).__module__ == __name__:
        return

    def check_and_update_config(cls, vllm_config):  # type: ignore[no-untyped-def]
        upstream(vllm_config)
        try:
            prepare.prepare(vllm_config)
        except (variables.SettingError, CheckpointError) as error:
            raise SystemExit(f"lvllm: {error}") from None

    platform.check_and_update_config = classmethod(check_and_update_config)  # type: ignore[assignment]
