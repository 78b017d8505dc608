"""Whether a model fits into this host's memory, checked before any weight is read.

A host with too little memory would otherwise learn of it minutes later, when the kernel kills a
process. What the model needs is `memory_need`'s; what is free comes from the kernel. Page cache
counts as free, since the kernel gives it up; the memory cgroup's limit counts, too.
"""

import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lvllm import engine
from lvllm.checkpoint.headers import Checkpoint, CheckpointError
from lvllm.engine import bank
from lvllm.machine.memory_need import Need, folder_of, needed
from lvllm.settings.variables import SettingError, UseWeight
from lvllm.units import gib

__all__ = [
    "Rank",
    "Room",
    "check",
    "check_built",
    "fits",
    "folder_of",
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
    """Free bytes."""

    total: int
    """What the host has, or its memory cgroup if that allows less."""
    nodes: Mapping[int, int]
    """What each NUMA node with memory has."""


@dataclass(frozen=True)
class Rank:
    """Where a rank's memory comes from."""

    workers: Mapping[int, int]
    """Engine threads on each node; the nodes get rows of the experts in proportion."""
    home: int
    """The node that vLLM binds all other memory of the rank to."""


def node_shares(
    need: Need, ranks: Sequence[Rank], free: Mapping[int, int], interleaved: bool
) -> dict[int, Need]:
    """What each of the nodes, with `free` bytes each, would hold."""
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
    shares[nodes[-1]] += size  # What fits on no node counts for the one with the most room.
    return shares


def shortage(need: Need, room: Room, ranks: Sequence[Rank], interleaved: bool) -> str | None:
    """One line that says what has too little room, with the numbers; None if all fits."""
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

    They are if a node has too little memory for all rows that it computes.

    Raises:
        SettingError: if the model does not fit, with what it takes, what is free, and the settings
            that would make it fit.
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
    use: UseWeight | None,
    may_interleave: bool,
    engine_cpus: Sequence[Sequence[int]],
    omp_cpus: Sequence[Sequence[int]],
    accelerator: str = "none",
    resident: Collection[int] = (),
    held: bool = False,
    prefill_kv_cache: int | None = None,
) -> bool:
    """Whether the experts of this model are to be interleaved over this host's NUMA nodes.

    Where the sizes cannot be known (no safetensors files yet), the answer is `may_interleave`, and
    memory is only checked when it is allocated.

    Args:
        vllm_config: vLLM's configuration, which names the model and its KV cache.
        use: LVLLM_MOE_USE_WEIGHT.
        may_interleave: LVLLM_ENABLE_NUMA_INTERLEAVE.
        engine_cpus: the logical CPUs of each local rank's engine.
        omp_cpus: those of each local rank's OpenMP threads.
        accelerator: what computes the `resident` layers. What a GPU ("cuda") holds is not counted.
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
        # If the prefill engine runs on a GPU, this host's memory holds only what is on its way.
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
    """Check a model without files: its parameters must fit beside `kv_cache` bytes.

    Most of the parameters have no pages yet, so they are not part of what the process takes now.

    Raises:
        MemoryError: if they do not fit, with the numbers.
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
    """Bytes of memory that this process takes, without page cache (RssAnon)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def _check_reserve(cache: Any, need: Need, ranks: Sequence[Rank]) -> None:
    """Refuse weights that leave no room for a KV cache whose size is not set.

    vLLM then gives a rank a share of its node's memory, and the cache what the weights leave of it.
    That they leave nothing vLLM would say only after loading.
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
    vllm_config: Any, use: UseWeight | None, ranks: int, resident: Collection[int] | None
) -> Need | None:
    """What the model takes on this host; None if its files are missing or not readable.

    The loader says what is wrong with the files.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    folder = folder_of(model.model, model.revision)
    if folder is None:
        return None
    try:
        tensors = Checkpoint.open(folder).tensors
    except CheckpointError:
        return None
    need = needed(
        tensors,
        use,
        layers=getattr(model.hf_text_config, "num_hidden_layers", None) or sys.maxsize,
        drafts=vllm_config.speculative_config is not None,
        resident=resident,
        section=model.model_arch_config.quantization_config,
    )
    # Tensor, pipeline and expert parallel ranks divide the weights. Data parallel ranks share the
    # experts, and each has a copy of the rest.
    here = ranks / (parallel.world_size * parallel.data_parallel_size)
    return Need(
        int(need.experts * here),
        int(need.others * ranks / parallel.world_size),
        ranks * (vllm_config.cache_config.kv_cache_memory_bytes or 0),
        int(need.experts_int4 * here),
    )


def free_on_nodes(
    root: Path = Path("/sys/devices/system/node"), allowed: Collection[int] | None = None
) -> dict[int, int]:
    """Free bytes of each NUMA node with memory that this process may use.

    Page cache and reclaimable kernel memory count as free. `allowed` are the nodes that the process
    may use, by default those of its cpuset. The result is empty without NUMA information.
    """
    if allowed is None:
        from vllm.utils.cpu_resource_utils import get_memory_affinity

        allowed = get_memory_affinity()
    free = {}
    for file in sorted(root.glob("node*/meminfo")):
        lines = (line.split() for line in file.read_text().splitlines())
        kib = {line[2].rstrip(":"): int(line[3]) for line in lines if len(line) >= 4}
        number = int(file.parent.name.removeprefix("node"))
        if kib.get("MemTotal") and number in allowed:
            reclaimable = ("MemFree", "Active(file)", "Inactive(file)", "SReclaimable")
            free[number] = 1024 * sum(kib.get(name, 0) for name in reclaimable)
    return free
