"""What a server did between two scrapes."""

from collections.abc import Mapping
from dataclasses import dataclass

from lvllm.top.scrape import Scrape

__all__ = ["PathRates", "Rates", "between"]


@dataclass(frozen=True)
class PathRates:
    """The experts of one class of layers on one path."""

    layers: str
    """The class: "offloaded", "resident" or "draft"."""
    path: str
    calls: float
    """A second. One call is a batch in one layer."""
    tokens: float
    """A second, counted once in each layer."""
    experts: float | None
    """Different experts of a batch, on average."""
    busy: float | None
    """The share of the time in which a rank computed, on average; None: it is not known."""
    waiting: float | None
    """The share of the time in which a rank waited."""
    gb_per_s: float | None
    """GB/s of weights: what all ranks together read while they compute, or copy while they copy."""
    reasons: Mapping[str, float]
    """Calls a second by the reason for the path."""


@dataclass(frozen=True)
class Rates:
    """What a server did in some seconds, and what it holds at their end."""

    seconds: float
    prompt_tokens: float
    """A second."""
    answer_tokens: float
    """A second."""
    running: int
    waiting: int
    kv_cache: float
    """The share of the KV cache in use, of the fullest replica."""
    paths: tuple[PathRates, ...]
    nodes: Mapping[str, float]
    """GB/s read from the memory of each NUMA node, on average over the time."""
    groups: Mapping[str, float]
    """Streamed groups of experts a second, by `hit`, `stall` and `miss`."""
    cache: Mapping[str, float]
    """Reads of experts a second, by `hit` and `miss` of the GPU's cache."""
    prefill_queue: Mapping[str, int]
    """Prompts on their way through the prefill engine, by stage."""
    nan_stops: int
    """Requests since the server's start."""
    bank_bytes: float
    staging_bytes: float
    cache_bytes: float


def between(before: Scrape, after: Scrape) -> Rates:
    """The rates between two scrapes of one server."""
    seconds = max(after.at - before.at, 1e-9)

    def rate(*by: str, name: str, **labels: str) -> dict[tuple[str, ...], float]:
        earlier = before.by(*by, name=name, **labels)
        return {
            # A server that has been started anew counts from zero.
            key: max(0.0, value - earlier.get(key, 0.0)) / seconds
            for key, value in after.by(*by, name=name, **labels).items()
        }

    def one(name: str) -> float:
        return sum(rate(name=name).values())

    calls = rate("class", "path", name="lvllm_expert_calls_total")
    tokens = rate("class", "path", name="lvllm_expert_tokens_total")
    reasons = rate("class", "path", "reason", name="lvllm_expert_calls_total")
    spent = rate("class", "path", "activity", "engine", "rank", name="lvllm_expert_seconds_total")
    read = rate("class", "engine", "rank", name="lvllm_expert_read_bytes_total")
    copied = rate("class", "engine", "rank", name="lvllm_copied_bytes_total", what="weights")
    experts = rate("class", "path", name="lvllm_batch_experts_sum")
    batches = rate("class", "path", name="lvllm_batch_experts_count")

    def share(kind: str, path: str, activity: str) -> float | None:
        of_ranks = [value for key, value in spent.items() if key[:3] == (kind, path, activity)]
        return sum(of_ranks) / len(of_ranks) if of_ranks else None

    def bandwidth(kind: str, path: str) -> float | None:
        moved, activity = (copied, "copying") if path == "streamed" else (read, "computing")
        rates = [
            moved.get((kind, *key[3:]), 0.0) / value
            for key, value in spent.items()
            if key[:3] == (kind, path, activity) and value > 0
        ]
        return sum(rates) / 1e9 if rates else None

    return Rates(
        seconds=seconds,
        prompt_tokens=one("vllm:prompt_tokens_total"),
        answer_tokens=one("vllm:generation_tokens_total"),
        running=int(after.sum("vllm:num_requests_running")),
        waiting=int(after.sum("vllm:num_requests_waiting")),
        kv_cache=max((value for _, value in after.found("vllm:kv_cache_usage_perc")), default=0.0),
        paths=tuple(
            PathRates(
                layers=kind,
                path=path,
                calls=value,
                tokens=tokens.get((kind, path), 0.0),
                experts=experts[kind, path] / batches[kind, path]
                if batches.get((kind, path))
                else None,
                busy=share(kind, path, "computing"),
                waiting=share(kind, path, "waiting"),
                gb_per_s=bandwidth(kind, path),
                reasons={key[2]: each for key, each in reasons.items() if key[:2] == (kind, path)},
            )
            for (kind, path), value in calls.items()
        ),
        nodes={
            node: value / 1e9
            for (node,), value in rate("node", name="lvllm_expert_read_bytes_total").items()
        },
        groups={
            key[0]: each for key, each in rate("result", name="lvllm_staged_groups_total").items()
        },
        cache={
            key[0]: each for key, each in rate("result", name="lvllm_cache_reads_total").items()
        },
        prefill_queue={
            stage: int(value)
            for (stage,), value in after.by("stage", name="lvllm_prefill_queue").items()
        },
        nan_stops=int(after.sum("lvllm_nan_stops_total")),
        bank_bytes=after.sum("lvllm_bank_bytes"),
        staging_bytes=after.sum("lvllm_staging_bytes"),
        cache_bytes=after.sum("lvllm_cache_bytes"),
    )
