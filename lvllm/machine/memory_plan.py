"""Check whether a model fits into this host's memory, before any weight is read.

Without this check, too little memory would show only minutes later, when the kernel kills a
process. `memory_need` says how much the model needs, and the kernel says how much is free. Page
cache counts as free, since the kernel gives it up. The limit of the memory cgroup counts as well.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lvllm import engine
from lvllm.checkpoint.headers import CheckpointError, TensorInfo
from lvllm.checkpoint.moe_layers import decoder_layers
from lvllm.checkpoint.opening import open_checkpoint
from lvllm.engine import bank, raw_ops
from lvllm.machine.memory_need import Need, folder_of, layers_of_experts, needed
from lvllm.settings.use_weight import LayerFormats
from lvllm.settings.variables import SettingError
from lvllm.units import gib

__all__ = [
    "Rank",
    "Room",
    "check",
    "check_built",
    "expert_layers",
    "fits",
    "free_on_nodes",
    "node_shares",
    "place",
    "resident_bytes",
    "shortage",
]

INTERLEAVE = "LVLLM_ENABLE_NUMA_INTERLEAVE=1"
INT4 = "LVLLM_MOE_USE_WEIGHT=INT4"
KV_CACHE = "kv-cache-memory-bytes"
ONE_ENGINE = "LVLLM_PREFILL_ENGINE=0"


@dataclass(frozen=True)
class Room:
    """Free memory, in bytes."""

    total: int
    """The free bytes of the host, or of this process's memory cgroup if that allows less."""
    nodes: Mapping[int, int]
    """The free bytes of each NUMA node that has memory."""


@dataclass(frozen=True)
class Rank:
    """The NUMA nodes that hold a rank's memory."""

    workers: Mapping[int, int]
    """The number of engine threads on each node. Each node holds rows of the experts in proportion.
    """
    home: int
    """The node that holds all other memory of the rank, because vLLM binds the rank to it."""


def node_shares(
    need: Need, ranks: Sequence[Rank], free: Mapping[int, int], interleaved: bool
) -> dict[int, Need]:
    """What each NUMA node would hold of the model; `free` has the free bytes of each node."""
    spread = _round_robin(need.experts, free) if interleaved else {}
    shares = {}
    for node in free:
        part = sum(r.workers.get(node, 0) / sum(r.workers.values()) for r in ranks) / len(ranks)
        experts = spread[node] if interleaved else int(need.experts * part)
        home = sum(rank.home == node for rank in ranks) / len(ranks)
        others, kv_cache = int(need.others * home), int(need.kv_cache * home)
        shares[node] = Need(experts, others, kv_cache, 0, int(need.prefill_engine * home))
    return shares


def _round_robin(size: int, free: Mapping[int, int]) -> dict[int, int]:
    """The bytes on each node when the kernel takes pages from all nodes round-robin.

    The kernel passes over a node that is full.
    """
    nodes = sorted(free, key=lambda node: free[node])
    shares = {}
    for full, node in enumerate(nodes):
        shares[node] = min(size // (len(nodes) - full), free[node])
        size -= shares[node]
    # Bytes that fit on no node count for the node with the most room.
    shares[nodes[-1]] += size
    return shares


def shortage(need: Need, room: Room, ranks: Sequence[Rank], interleaved: bool) -> str | None:
    """One line that says where memory is too small, with the numbers; None if the model fits."""
    if need.total > room.total:
        return (
            f"the model takes {gib(need.total)} of memory ({need.describe()}),"
            f" {gib(room.total)} are free"
        )
    if len(room.nodes) < 2:
        return None
    for node, share in node_shares(need, ranks, room.nodes, interleaved).items():
        if share.total > room.nodes[node]:
            return (
                f"NUMA node {node} would hold {gib(share.total)} of the model"
                f" ({share.describe()}), {gib(room.nodes[node])} are free on it"
            )
    return None


def place(need: Need, room: Room, ranks: Sequence[Rank], may_interleave: bool) -> bool:
    """Whether the experts' pages must be interleaved over the nodes.

    That is so if a node has too little memory for all rows that it computes.

    Raises:
        SettingError: if the model does not fit. The text names the size it needs, the free size,
            and the settings that would make it fit.
    """
    if shortage(need, room, ranks, False) is None:
        return False
    if (short := shortage(need, room, ranks, may_interleave)) is None:
        return True
    raise SettingError(f"{short}: {_remedies(need, room, ranks, may_interleave)}")


def _remedies(need: Need, room: Room, ranks: Sequence[Rank], may_interleave: bool) -> str:
    small = replace(need, experts=min(need.experts, need.experts_int4))
    alone = replace(need, prefill_engine=0)
    found = []
    if not may_interleave and fits(need, room, ranks, True):
        found.append(INTERLEAVE)
    if fits(small, room, ranks, may_interleave):
        found.append(INT4)
    if not found and fits(small, room, ranks, True):
        found.append(f"{INTERLEAVE} with {INT4}")
    if need.prefill_engine and fits(alone, room, ranks, may_interleave):
        found.append(ONE_ENGINE)
    if most := _most_kv_cache(need, room, ranks, may_interleave):
        found.append(f"{KV_CACHE}={most // len(ranks)} or less")
    if found:
        return f"{' or '.join(found)} makes it fit"
    least = replace(small, kv_cache=0, prefill_engine=0).total
    return f"no setting makes it fit; with {INT4} and no KV cache it takes {gib(least)}"


def fits(need: Need, room: Room, ranks: Sequence[Rank], may_interleave: bool) -> bool:
    """Whether the model fits, with interleaved pages if they are allowed."""
    ways = {False, may_interleave}
    return any(shortage(need, room, ranks, interleaved) is None for interleaved in ways)


def _most_kv_cache(need: Need, room: Room, ranks: Sequence[Rank], may_interleave: bool) -> int:
    """Bytes of the largest KV cache that fits, in whole MiB for each rank; 0 if none fits."""
    unit = len(ranks) << 20
    fitting, least = 0, need.kv_cache // unit
    while fitting < least:
        middle = (fitting + least + 1) // 2
        if fits(replace(need, kv_cache=middle * unit), room, ranks, may_interleave):
            fitting = middle
        else:
            least = middle - 1
    return fitting * unit


def check(
    vllm_config: Any,
    use: LayerFormats | None,
    may_interleave: bool,
    engine_cpus: Sequence[Sequence[int]],
    omp_cpus: Sequence[Sequence[int]],
    accelerator: str = "none",
    resident: Collection[int] = (),
    held: bool = False,
    prefill_kv_cache: int | None = None,
) -> bool:
    """Whether the experts' pages must be interleaved over this host's NUMA nodes.

    If the sizes are unknown (there are no safetensors files yet), the answer is `may_interleave`,
    and memory is only checked when it is allocated.

    Args:
        vllm_config: vLLM's configuration, which names the model and its KV cache.
        use: LVLLM_MOE_USE_WEIGHT.
        may_interleave: LVLLM_ENABLE_NUMA_INTERLEAVE.
        engine_cpus: the logical CPUs of each local rank's engine.
        omp_cpus: the logical CPUs of each local rank's OpenMP threads.
        accelerator: LVLLM_ACCELERATOR. Weights that a GPU ("cuda") holds are not counted.
        resident: the layers whose experts the accelerator holds.
        held: whether another engine has the experts in memory, or is about to, and shares them.
        prefill_kv_cache: bytes of a prefill engine's KV cache; None: there is no such engine. It
            also has a copy of all weights but the experts.

    Raises:
        SettingError: if the model does not fit.
    """
    nodes = {node.id: set(node.cpus) for node in engine.topology().nodes}
    room = Room(bank.available_bytes(), free_on_nodes())
    with_vllm = None if accelerator == "none" else resident
    need = _need_of(vllm_config, use, len(engine_cpus), with_vllm)
    if need is None:
        return may_interleave and len(room.nodes) > 1
    if held:
        need = replace(need, experts=0, experts_int4=0)
    if prefill_kv_cache is not None:
        # If the prefill engine runs on a GPU, this host's memory holds only keys and values that
        # are on their way to the first engine.
        own = 0 if accelerator == "cuda" else need.others + prefill_kv_cache
        need = replace(need, prefill_engine=own + prefill_kv_cache)

    def node_of(cpu: int) -> int:
        return next((node for node, cpus in nodes.items() if cpu in cpus), 0)

    ranks = [
        Rank(Counter(node_of(cpu) for cpu in cpus), node_of(omp[0]))
        for cpus, omp in zip(engine_cpus, omp_cpus, strict=True)
    ]
    if accelerator == "cuda":
        return place(replace(need, others=0, kv_cache=0), room, ranks, may_interleave)
    interleaved = place(need, room, ranks, may_interleave)
    _check_reserve(vllm_config.cache_config, need, ranks)
    return interleaved


def check_built(model: torch.nn.Module, kv_cache: int) -> None:
    """Check a model that has no files: its parameters must fit beside `kv_cache` bytes.

    Most of the parameters have no pages yet, so they do not count in this process's memory so far.

    Raises:
        MemoryError: if the model does not fit. The text has the numbers.
    """
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    experts = bank.allocated_bytes()
    others = sum(
        parameter.nbytes
        for module in model.modules()
        if not isinstance(module, RoutedExperts)
        for parameter in module.parameters(recurse=False)
    )
    need, free = Need(experts, others, kv_cache, 0), bank.available_bytes() + resident_bytes()
    if need.total > free:
        raise MemoryError(
            f"the model takes {gib(need.total)} of memory ({need.describe()}), {gib(free)} are free"
        )


def resident_bytes() -> int:
    """Bytes of memory that this process uses, without page cache (the kernel's RssAnon)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def _check_reserve(cache: Any, need: Need, ranks: Sequence[Rank]) -> None:
    """Raise SettingError if the weights leave no room for a KV cache whose size is not set.

    If the size is not set, vLLM gives each rank a share of its node's memory, and the KV cache gets
    the part that the weights leave. vLLM itself would report only after loading that nothing is
    left.
    """
    from vllm.utils.cpu_resource_utils import get_memory_node_info

    if cache.kv_cache_memory_bytes is not None:
        return
    weights = (need.experts + need.others) / len(ranks)
    for rank in ranks:
        share = cache.gpu_memory_utilization * get_memory_node_info(rank.home).total_memory
        if weights >= share:
            raise SettingError(
                f"gpu-memory-utilization={cache.gpu_memory_utilization} gives a rank {gib(share)}"
                f" for weights and KV cache, and the weights take {gib(weights)}: {KV_CACHE} sets"
                " the size of the KV cache alone"
            )


def _need_of(
    vllm_config: Any, use: LayerFormats | None, ranks: int, resident: Collection[int] | None
) -> Need | None:
    """The bytes that the model takes on this host; None if its files are missing or not readable.

    In that case the loader will report what is wrong with the files.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    tensors = _tensors_of(model)
    if tensors is None:
        return None
    need = needed(
        tensors,
        use,
        layers=_layers(model),
        drafts=vllm_config.speculative_config is not None,
        resident=resident,
        section=model.model_arch_config.quantization_config,
    )
    # Tensor, pipeline and expert parallel ranks divide all weights. Data parallel replicas divide
    # only the experts, and each replica has a copy of all other weights.
    here = ranks / (parallel.world_size * parallel.data_parallel_size)
    return Need(
        int(need.experts * here),
        int(need.others * ranks / parallel.world_size),
        ranks * (vllm_config.cache_config.kv_cache_memory_bytes or 0),
        int(need.experts_int4 * here),
    )


def expert_layers(vllm_config: Any) -> list[str] | None:
    """vLLM's names for the experts of each layer; None if the model's files are not here.

    A few families, such as MiniMax-M2, are renamed where vLLM loads their weights. These keep the
    checkpoint's names.
    """
    model = vllm_config.model_config
    tensors = _tensors_of(model)
    if tensors is None:
        return None
    drafts = vllm_config.speculative_config is not None
    names = layers_of_experts(tensors, layers=_layers(model), drafts=drafts)
    return list(map(_renaming(model), names))


def _tensors_of(model: Any) -> Mapping[str, TensorInfo] | None:
    """All tensors of a model by name; None if its files are missing or not readable."""
    folder = folder_of(model.model, model.revision)
    if folder is None:
        return None
    try:
        return open_checkpoint(folder).tensors
    except CheckpointError:
        return None


def _layers(model: Any) -> int:
    return decoder_layers(model.hf_text_config) or sys.maxsize


def _renaming(model: Any) -> Callable[[str], str]:
    """A function from the name of a module in the checkpoint to vLLM's name for it."""
    from vllm.model_executor.model_loader.utils import get_model_architecture

    model_class, _ = get_model_architecture(model)
    mapper = getattr(model_class, "hf_to_vllm_mapper", None)
    if mapper is None:
        return str
    renames = mapper.get_rename_mapper()
    return lambda name: renames.map_name(name) or name


def free_on_nodes(
    sysfs: Path = Path("/sys"), allowed: Collection[int] | None = None
) -> dict[int, int]:
    """Free bytes of each NUMA node with memory that this process may use.

    Page cache and reclaimable kernel memory count as free. `allowed` are the nodes that the process
    may use, by default those of its cpuset. The result is empty without NUMA information.
    """
    if allowed is None:
        allowed = raw_ops.memory_nodes()
    nodes = json.loads(raw_ops.numa_memory(str(sysfs)))
    return {
        node["id"]: node["free_bytes"]
        for node in nodes
        if node["total_bytes"] and node["id"] in allowed
    }
