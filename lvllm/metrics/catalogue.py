"""All metrics of LvLLM: docs/metrics.md has the same list."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["METRICS", "Metric"]


@dataclass(frozen=True)
class Metric:
    """One metric, as Prometheus describes it."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    meaning: str

    @property
    def samples(self) -> tuple[str, ...]:
        """The names under which values are exported."""
        if self.kind == "histogram":
            return tuple(f"{self.name}_{part}" for part in ("bucket", "sum", "count"))
        return (self.name,)


_RANK = ("engine", "rank")
_LAYERS = (*_RANK, "class")
_PATH = (*_LAYERS, "path")

METRICS = (
    Metric(
        "lvllm_expert_calls_total",
        "counter",
        (*_PATH, "reason"),
        "Batches that went through the experts of a layer, by where they were computed and why.",
    ),
    Metric(
        "lvllm_expert_tokens_total",
        "counter",
        (*_PATH, "reason"),
        "Tokens of these batches.",
    ),
    Metric(
        "lvllm_expert_seconds_total",
        "counter",
        (*_PATH, "activity"),
        "Seconds that these batches were computed, that their weights were copied, and that they"
        " waited.",
    ),
    Metric(
        "lvllm_batch_experts",
        "histogram",
        _PATH,
        "How many different experts the tokens of a batch have in one layer.",
    ),
    Metric(
        "lvllm_expert_read_bytes_total",
        "counter",
        (*_LAYERS, "node"),
        "Bytes of expert weights that the engine read from the memory of a NUMA node.",
    ),
    Metric(
        "lvllm_copied_bytes_total",
        "counter",
        (*_LAYERS, "what"),
        "Bytes of weights and activations that were copied between the host and the GPU, and of"
        " weights to the GPU's cache.",
    ),
    Metric(
        "lvllm_staged_groups_total",
        "counter",
        (*_LAYERS, "result"),
        "Groups of experts that were streamed, by whether their copy was complete when they were"
        " needed.",
    ),
    Metric(
        "lvllm_cache_reads_total",
        "counter",
        (*_RANK, "result"),
        "Experts that batches read outside of streaming, by whether the GPU's cache had them. They"
        " are counted every 32 steps, with the slots of that time.",
    ),
    Metric(
        "lvllm_routed_tokens_total",
        "counter",
        (*_LAYERS, "layer", "expert"),
        "Tokens that the router gave to an expert; only with LVLLM_METRICS_EXPERTS=1.",
    ),
    Metric(
        "lvllm_nan_stops_total",
        "counter",
        ("engine",),
        "Requests that ended with an error because their numbers were NaN or infinite.",
    ),
    Metric(
        "lvllm_prefill_queue",
        "gauge",
        ("engine", "stage"),
        "Long prompts on their way through the prefill engine.",
    ),
    Metric(
        "lvllm_prefill_prompts_total",
        "counter",
        ("engine", "result"),
        "Long prompts that were sent to the prefill engine, and what became of them.",
    ),
    Metric(
        "lvllm_expert_layers",
        "gauge",
        _LAYERS,
        "Layers with experts that a worker has.",
    ),
    Metric(
        "lvllm_bank_bytes",
        "gauge",
        _LAYERS,
        "Host memory of expert weights that the engine computes on.",
    ),
    Metric(
        "lvllm_staging_bytes",
        "gauge",
        (*_RANK, "memory"),
        "Memory through which weights and activations are copied between the host and the GPU.",
    ),
    Metric(
        "lvllm_cache_bytes",
        "gauge",
        _RANK,
        "The GPU's memory for the experts that are read most.",
    ),
    Metric(
        "lvllm_streaming_threshold_tokens",
        "gauge",
        _RANK,
        "Batches of at least this many tokens are streamed; 0: none is.",
    ),
)
