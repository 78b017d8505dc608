"""The settings in their final form, which the front process hands to every worker.

Workers parse nothing and decide nothing. All they need to know is in a `HybridConfig`, which
travels inside vLLM's `additional_config`.
"""

from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict

from lvllm.settings.use_weight import LayerFormats
from lvllm.settings.variables import DenseWeight, ThreadBinding

__all__ = ["RESOLVED", "Accelerator", "HybridConfig", "PrefillEngine"]

RESOLVED = "lvllm_resolved"
"""The key of `additional_config` under which the final settings travel."""

Accelerator = Literal["none", "host", "cuda"]
"""Where everything but the offloaded experts runs: see LVLLM_ACCELERATOR."""


@dataclass(frozen=True)
class PrefillEngine:
    """Which prompts a second engine prefills, and where."""

    min_tokens: int
    """Prompts of at least this many tokens go to the second engine. Tokens that are in the prefix
    cache do not count."""
    gpu: int | None
    """The second engine's GPU, as CUDA numbers them; None: the decoding engine's GPU."""


class HybridConfig(BaseModel):
    """All settings that a worker needs; every value is final."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    thread_binding: ThreadBinding
    power_saving: bool
    # Whether nothing else needs the engine's cores between two layers, so that its threads may spin
    # there for longer.
    own_cores: bool
    # The number format in which each layer's experts are computed, and the device that converts
    # them to it.
    use_weight: LayerFormats
    # The number format of linear layers outside the experts, which the engine multiplies; None:
    # vLLM multiplies them, because they are on a GPU.
    dense_weight: DenseWeight | None
    quantize_on: str
    # Bits of the activations that experts are multiplied with; None: each format's default.
    activation_bits: int | None
    # Logical CPUs of each rank of this host, for the engine and for PyTorch.
    engine_cpus: tuple[tuple[int, ...], ...]
    omp_cpus: tuple[tuple[int, ...], ...]
    # Whether pages of expert weights are spread over all NUMA nodes round-robin, because the nodes
    # that compute the rows have too little memory for them.
    numa_interleave: bool
    # Where attention and everything else but the offloaded experts runs. "none": experts run on lk
    # without an accelerator, and gpu_* and defer_experts below are unused.
    accelerator: Accelerator
    # Layers, by the model's own numbers, whose experts stay on the accelerator with vLLM's method.
    gpu_resident_moe_layers: tuple[int, ...]
    # How many layers are copied to the accelerator ahead of the one being computed.
    gpu_prefetch_window: int
    # The most memory on each accelerator for copies of experts, in MiB.
    gpu_staging_mib: int
    # Batches of at least this many tokens have their experts streamed; 0: never; "auto": the
    # workers measure the break-even batch size.
    gpu_prefill_min_batch_size: int | Literal["auto"]
    # Bytes of each accelerator for the experts that are read most: one number for all ranks of this
    # host, or one for each. "auto": what the KV cache does not need.
    gpu_expert_cache: tuple[int | Literal["auto"], ...]
    # How the accelerator calls lk.
    gpu_call: Literal["hostfunc", "mailbox", "auto"]
    # In decoding, how many of a token's experts are added one layer later.
    defer_experts: int
    # How long a copy or a callback to the host may take; 0: any time.
    watchdog_seconds: int
    # Whether loaded layers are compared with float32 before the first request.
    verify: bool
    # Whether /metrics has the tokens of each expert.
    metrics_experts: bool
    # The name under which engines of this host find each other's experts; None: they do not share.
    shared_experts: str | None
    # The name of the bank for which this engine loads the experts; None: for itself.
    bank: str | None
    # Which prompts another engine prefills, and where; None: this engine prefills all.
    prefill_engine: PrefillEngine | None

    @classmethod
    def current(cls) -> Self:
        """The settings of the engine that is being built in this process."""
        from vllm.config import get_current_vllm_config

        return cls.carried(get_current_vllm_config())

    @classmethod
    def current_or_none(cls) -> Self | None:
        """As `current`; None where a layer or a model is built outside an engine.

        Tools and tests do that with a configuration of vLLM that has no model, or without any.
        """
        from vllm.config import get_current_vllm_config_or_none

        vllm_config = get_current_vllm_config_or_none()
        if vllm_config is None or RESOLVED not in vllm_config.additional_config:
            return None
        return cls.carried(vllm_config)

    @classmethod
    def carried(cls, vllm_config: Any) -> Self:
        """The settings that the front process has put into an engine's configuration."""
        return cls.model_validate(vllm_config.additional_config[RESOLVED])
