"""What a worker counts: it gives memory to the layers of its model, and says what is in it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from lvllm.checkpoint.moe_layers import layer_number
from lvllm.engine import EngineInfo, ExpertLayer, info
from lvllm.engine import counters as of_engine
from lvllm.engine.counters import SIZES, Reason
from lvllm.faults.nonfinite import modules_of
from lvllm.gpu import OffloadedLayer, caches
from lvllm.gpu import counters as of_gpu
from lvllm.gpu.cache import counters as of_cache
from lvllm.gpu.cache.counters import CacheCounters
from lvllm.gpu.counters import StreamedCounters
from lvllm.metrics.memory import Series, engine_name, open_block
from lvllm.settings.configuration import HybridConfig
from lvllm.units import ceil_div

__all__ = ["Steps", "count_worker", "node_bytes"]

STEPS, STEP_TOKENS = range(2)
TILE_ROWS = 64
"""NUMA nodes own whole tiles of so many rows: kTileRows in csrc/lk/rows.h."""


class Steps:
    """Counts the steps of a worker: the layers that vLLM computes are not seen one by one."""

    def __init__(self, numbers: Any) -> None:
        self._numbers = numbers

    def add(self, scheduler_output: Any) -> None:
        """Count a step, as vLLM's scheduler describes it."""
        if self._numbers is not None and scheduler_output.total_num_scheduled_tokens:
            self._numbers[STEPS] += 1
            self._numbers[STEP_TOKENS] += scheduler_output.total_num_scheduled_tokens


@dataclass(frozen=True)
class _Layer:
    """A layer with experts. `experts` is None if vLLM computes the layer."""

    module: Any
    kind: str
    experts: ExpertLayer | None

    @property
    def offloaded(self) -> OffloadedLayer | None:
        return getattr(self.module, "offloaded", None)

    @property
    def numbers_of_experts(self) -> list[str]:
        """The experts that this rank holds, as the model numbers them."""
        assert self.experts is not None, "asked only of layers in the engine"
        expert_map = self.module.expert_map
        if expert_map is None:
            return [str(expert) for expert in range(self.experts.num_experts)]
        held = (expert_map >= 0).nonzero().flatten()
        return [str(expert) for expert in held[expert_map[held].argsort()].tolist()]


def count_worker(worker: Any) -> Steps:
    """Begin to count what this worker computes. Call this when the model has been warmed up.

    Args:
        worker: vLLM's worker. Its model runner may have a model of drafts beside the main one.
    """
    vllm_config, runner = worker.vllm_config, worker.model_runner
    model, draft = runner.get_model(), runner.get_draft_model()
    labels = {"engine": engine_name(vllm_config), "rank": str(worker.rank)}
    layers = [*_layers(model, "offloaded", "resident")]
    if isinstance(draft, torch.nn.Module):
        layers += _layers(draft, "draft", "draft")
    config = HybridConfig.carried(vllm_config)
    on_engine = [layer for layer in layers if layer.experts is not None]
    _count_engine(labels, on_engine, config)
    streamed = [layer for layer in on_engine if layer.offloaded and layer.offloaded.ring]
    _count_streamed(labels, streamed, config)
    _count_caches(labels)
    _tell_sizes(labels, layers)
    return Steps(open_block(labels, _resident_series(layers), 2))


def _layers(model: torch.nn.Module, on_engine: str, resident: str) -> list[_Layer]:
    engines = {id(module): module.engine for module in modules_of(model)}
    return [
        _Layer(module, on_engine if id(module) in engines else resident, engines.get(id(module)))
        for module in model.modules()
        if isinstance(module, RoutedExperts)
    ]


def _by_kind(layers: Sequence[_Layer]) -> dict[str, list[int]]:
    """The places of the layers of each class."""
    found: dict[str, list[int]] = {}
    for place, layer in enumerate(layers):
        found.setdefault(layer.kind, []).append(place)
    return found


def _places(begins: Sequence[int]) -> Callable[[Sequence[int], int], list[int]]:
    """A function that tells where some layers have one of their numbers."""

    def places(layers: Sequence[int], number: int) -> list[int]:
        return [begins[layer] + number for layer in layers]

    return places


def _starts(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where each layer's numbers begin, and how many there are in all."""
    ends = np.cumsum([0, *sizes]).tolist()
    return ends[:-1], ends[-1]


def _histogram(
    labels: Mapping[str, str],
    of_layers: Sequence[int],
    places: Callable[[Sequence[int], int], list[int]],
    first: int,
    reads: int,
) -> list[Series]:
    """`lvllm_batch_experts` of some layers. `first` and `reads` are places in a layer's numbers."""
    series, below = [], []
    for at, most in enumerate(SIZES):
        below += places(of_layers, first + at)
        bound = {"le": "+Inf" if most is None else str(float(most))}
        series.append(Series("lvllm_batch_experts_bucket", {**labels, **bound}, list(below)))
    return [
        *series,
        Series("lvllm_batch_experts_sum", labels, places(of_layers, reads)),
        Series("lvllm_batch_experts_count", labels, below),
    ]


def _count_engine(
    labels: Mapping[str, str], layers: Sequence[_Layer], config: HybridConfig
) -> None:
    """Let the engine count the calls of its layers."""
    experts = [layer.experts for layer in layers if layer.experts is not None]
    begins, size = _starts([of_engine.size(one.num_experts) for one in experts])
    at, machine = _places(begins), info()
    series = []
    for kind, of_kind in _by_kind(layers).items():
        on_path = {"class": kind, "path": "cpu"}
        reasons = [reason for reason in Reason if (reason is Reason.NO_GPU) != _beside_gpu(layers)]
        for reason in reasons:
            why = on_path | {"reason": reason.name.lower()}
            calls, tokens = of_engine.calls(reason), of_engine.tokens(reason)
            series.append(Series("lvllm_expert_calls_total", why, at(of_kind, calls)))
            series.append(Series("lvllm_expert_tokens_total", why, at(of_kind, tokens)))
        computing = [
            place for reason in reasons for place in at(of_kind, of_engine.nanoseconds(reason))
        ]
        for activity, slots in (
            ("computing", computing),
            ("waiting", at(of_kind, of_engine.WAITED)),
        ):
            doing = on_path | {"activity": activity}
            series.append(Series("lvllm_expert_seconds_total", doing, slots, 1e-9))
        series += _histogram(on_path, of_kind, at, of_engine.PASSES, of_engine.READS)
        series += _read_series(kind, of_kind, at, experts, machine, config.numa_interleave)
        if _beside_gpu(layers):
            series.append(_activation_series(kind, of_kind, at, layers, experts))
    if config.metrics_experts:
        series += _routing(layers, begins, of_engine.TOKENS_OF_EXPERTS)
    numbers = open_block(labels, series, size)
    if numbers is not None:
        for one, begin in zip(experts, begins, strict=True):
            end = begin + of_engine.size(one.num_experts)
            of_engine.count(one.handle, torch.from_numpy(numbers[begin:end]))


def _beside_gpu(layers: Sequence[_Layer]) -> bool:
    return any(layer.offloaded is not None for layer in layers)


def _read_series(
    kind: str,
    of_kind: Sequence[int],
    at: Callable[[Sequence[int], int], list[int]],
    experts: Sequence[ExpertLayer],
    machine: EngineInfo,
    interleave: bool,
) -> list[Series]:
    each = [node_bytes(experts[layer], machine, interleave) for layer in of_kind]
    return [
        Series(
            "lvllm_expert_read_bytes_total",
            {"class": kind, "node": str(node)},
            at(of_kind, of_engine.READS),
            [shares[node] for shares in each],
        )
        for node in machine.nodes
    ]


def _activation_series(
    kind: str,
    of_kind: Sequence[int],
    at: Callable[[Sequence[int], int], list[int]],
    layers: Sequence[_Layer],
    experts: Sequence[ExpertLayer],
) -> Series:
    """The bytes of x and y in 16 bits, and of an id and a router's weight for each choice."""
    slots: list[int] = []
    scales: list[float] = []
    for layer in of_kind:
        offloaded = layers[layer].offloaded
        topk = 0 if offloaded is None else offloaded.topk
        for reason in Reason:
            slots += at([layer], of_engine.tokens(reason))
            scales.append(2 * 2 * experts[layer].hidden_size + 2 * 4 * topk)
    return Series("lvllm_copied_bytes_total", {"class": kind, "what": "activations"}, slots, scales)


def node_bytes(experts: ExpertLayer, machine: EngineInfo, interleave: bool) -> dict[int, float]:
    """The bytes of one expert in the memory of each NUMA node, as the engine divides its rows."""
    workers = [machine.worker_nodes.count(node) for node in machine.nodes]
    before = np.cumsum([0, *workers]).tolist()
    of_nodes = dict.fromkeys(machine.nodes, 0.0)
    for name, tensor in experts.tensors.items():
        bytes_of_one = tensor.nbytes / experts.num_experts
        rows = experts.hidden_size if name.startswith("w2") else experts.intermediate_size
        tiles = ceil_div(rows, TILE_ROWS)
        for place, node in enumerate(machine.nodes):
            if interleave:
                share = 1 / len(machine.nodes)
            else:
                bounds = [
                    min(tiles * count // before[-1] * TILE_ROWS, rows)
                    for count in before[place : place + 2]
                ]
                share = (bounds[1] - bounds[0]) / rows
            of_nodes[node] += share * bytes_of_one
    return of_nodes


def _count_streamed(
    labels: Mapping[str, str], layers: Sequence[_Layer], config: HybridConfig
) -> None:
    """Let the layers that are streamed count their streamed batches."""
    if not layers:
        return
    streamed = [layer.offloaded for layer in layers if layer.offloaded is not None]
    begins, size = _starts([of_gpu.size(one.experts.num_experts) for one in streamed])
    at = _places(begins)
    series = []
    for kind, of_kind in _by_kind(layers).items():
        on_path = {"class": kind, "path": "streamed"}
        why = on_path | {"reason": "large"}
        series.append(Series("lvllm_expert_calls_total", why, at(of_kind, of_gpu.CALLS)))
        series.append(Series("lvllm_expert_tokens_total", why, at(of_kind, of_gpu.TOKENS)))
        for activity, number in (
            ("computing", of_gpu.COMPUTING),
            ("copying", of_gpu.COPYING),
            ("waiting", of_gpu.WAITING),
        ):
            doing = on_path | {"activity": activity}
            series.append(Series("lvllm_expert_seconds_total", doing, at(of_kind, number), 1e-9))
        series += _histogram(on_path, of_kind, at, of_gpu.PASSES, of_gpu.READS)
        copied = {"class": kind, "what": "weights"}
        series.append(Series("lvllm_copied_bytes_total", copied, at(of_kind, of_gpu.BYTES)))
        for result, number in (
            ("hit", of_gpu.HITS),
            ("stall", of_gpu.STALLS),
            ("miss", of_gpu.MISSES),
        ):
            came = {"class": kind, "result": result}
            series.append(Series("lvllm_staged_groups_total", came, at(of_kind, number)))
    if config.metrics_experts:
        series += _routing(layers, begins, of_gpu.TOKENS_OF_EXPERTS)
    numbers = open_block(labels, series, size)
    if numbers is not None:
        for layer, begin in zip(streamed, begins, strict=True):
            end = begin + of_gpu.size(layer.experts.num_experts)
            layer.count(StreamedCounters(numbers[begin:end]))


def _count_caches(labels: Mapping[str, str]) -> None:
    """Let the caches of experts count the reads that find a slot."""
    for cache in caches():
        series = [
            Series("lvllm_cache_reads_total", {"result": "hit"}, [of_cache.HITS]),
            Series("lvllm_cache_reads_total", {"result": "miss"}, [of_cache.MISSES]),
            Series(
                "lvllm_copied_bytes_total",
                {"class": "offloaded", "what": "cache"},
                [of_cache.MOVED],
            ),
        ]
        numbers = open_block(labels, series, of_cache.SIZE)
        if numbers is not None:
            cache.count(CacheCounters(numbers))


def _routing(layers: Sequence[_Layer], begins: Sequence[int], first: int) -> list[Series]:
    """The tokens of each expert of each layer."""
    series = []
    for layer, begin in zip(layers, begins, strict=True):
        experts = layer.numbers_of_experts
        name = layer.module.layer_name
        number = layer_number(name)
        named = {"class": layer.kind, "layer": name if number is None else str(number)}
        slots = range(begin + first, begin + first + len(experts))
        series.append(
            Series("lvllm_routed_tokens_total", named, [*slots], each=("expert", experts))
        )
    return series


def _tell_sizes(labels: Mapping[str, str], layers: Sequence[_Layer]) -> None:
    """Export what does not change: how many layers there are, and the memory they take."""
    told: list[tuple[str, dict[str, str], int]] = []
    for kind, places in _by_kind(layers).items():
        held = [layers[place] for place in places]
        told.append(("lvllm_expert_layers", {"class": kind}, len(held)))
        bank = sum(
            tensor.nbytes
            for layer in held
            if layer.experts is not None
            for tensor in layer.experts.tensors.values()
        )
        told.append(("lvllm_bank_bytes", {"class": kind}, bank))
    offloaded = [layer.offloaded for layer in layers if layer.offloaded is not None]
    if offloaded:
        first = offloaded[0]
        ring = first.ring.staging_bytes if first.ring is not None else 0
        pinned = first.call.buffers.nbytes
        told.append(("lvllm_staging_bytes", {"memory": "ring"}, ring))
        told.append(("lvllm_staging_bytes", {"memory": "pinned"}, pinned))
        if found := caches():
            told.append(("lvllm_cache_bytes", {}, sum(cache.nbytes for cache in found)))
        told.append(("lvllm_streaming_threshold_tokens", {}, first.threshold))
    series = [Series(name, own, [place]) for place, (name, own, _) in enumerate(told)]
    numbers = open_block(labels, series, len(told))
    if numbers is not None:
        numbers[:] = [value for _, _, value in told]


def _resident_series(layers: Sequence[_Layer]) -> list[Series]:
    """Each step is a batch of every resident layer. A draft model may run several times a step."""
    resident = [layer for layer in layers if layer.kind == "resident"]
    if not resident:
        return []
    why = {"class": "resident", "path": "resident", "reason": "resident"}
    return [
        Series("lvllm_expert_calls_total", why, [STEPS], float(len(resident))),
        Series("lvllm_expert_tokens_total", why, [STEP_TOKENS], float(len(resident))),
    ]
