"""Whether a model's weights and KV cache fit into this host's memory, before any of it is read.

What is needed comes from the headers of the checkpoint's files, what is there from the kernel:
page cache counts as free, for it gives way; the memory cgroup's limit counts, too. A host with too
little memory would otherwise learn it minutes later, from the kernel's killing a process.

The sums are lower bounds: nothing is added for interpreters and buffers, about 1 GiB a rank. What
they refuse cannot fit.
"""

import math
import re
import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lvllm import engine
from lvllm.checkpoint.headers import Checkpoint, CheckpointError, TensorInfo
from lvllm.checkpoint.moe_layers import layer_number
from lvllm.engine import bank
from lvllm.settings.variables import SettingError, UseWeight
from lvllm.units import gib

INTERLEAVE = "LVLLM_ENABLE_NUMA_INTERLEAVE=1"
INT4 = "LVLLM_MOE_USE_WEIGHT=INT4"
KV_CACHE = "kv-cache-memory-bytes"
ONE_ENGINE = "LVLLM_PREFILL_ENGINE=0"
INT4_BITS = 4.5
"""Of a weight: groups of 32 share a scale of 16 bits."""

_EXPERTS = re.compile(r"\.experts\.")
_DRAFTS = re.compile(r"^(?:model\.)?mtp\.")
# What of an expert's tensors are its weights; the others are scales and the like.
_WEIGHTS = re.compile(r"(?:weight|weight_packed|qweight|_proj|_blocks|\.w[123])$")


@dataclass(frozen=True)
class Need:
    """Bytes of a model on this host, all ranks together."""

    experts: int
    others: int
    """All other weights."""
    kv_cache: int
    experts_int4: int
    """What the experts would take in 4-bit groups."""
    prefill_engine: int = 0
    """What a second engine takes beside the experts: its other weights, its KV cache, and as much
    again for what is on its way to the first.
    """

    @property
    def total(self) -> int:
        return self.experts + self.others + self.kv_cache + self.prefill_engine

    def describe(self) -> str:
        parts = f"experts {gib(self.experts)}, other weights {gib(self.others)}"
        more = {"KV cache": self.kv_cache, "prefill engine": self.prefill_engine}
        return parts + "".join(f", {name} {gib(size)}" for name, size in more.items() if size)


@dataclass(frozen=True)
class Room:
    """Free bytes: of the host or its memory cgroup, and of each NUMA node with memory."""

    total: int
    nodes: Mapping[int, int]


@dataclass(frozen=True)
class Rank:
    """Where a rank's memory comes from."""

    workers: Mapping[int, int]
    """Engine threads on each node: the experts' rows are divided among nodes in proportion."""
    home: int
    """The node that vLLM binds all other memory of the rank to."""


def node_shares(
    need: Need, ranks: Sequence[Rank], free: Mapping[int, int], interleaved: bool
) -> dict[int, Need]:
    """What each node would hold, of those with `free` bytes each."""
    spread = _in_turns(need.experts, free) if interleaved else {}
    shares = {}
    for node in free:
        part = sum(r.workers.get(node, 0) / sum(r.workers.values()) for r in ranks) / len(ranks)
        experts = spread[node] if interleaved else int(need.experts * part)
        home = sum(rank.home == node for rank in ranks) / len(ranks)
        others, kv_cache = int(need.others * home), int(need.kv_cache * home)
        shares[node] = Need(experts, others, kv_cache, 0, int(need.prefill_engine * home))
    return shares


def _in_turns(size: int, free: Mapping[int, int]) -> dict[int, int]:
    """How pages lie that the kernel takes from all nodes in turns: a full node is passed over."""
    nodes = sorted(free, key=lambda node: free[node])
    shares = {}
    for passed, node in enumerate(nodes):
        shares[node] = min(size // (len(nodes) - passed), free[node])
        size -= shares[node]
    shares[nodes[-1]] += size  # what fits nowhere
    return shares


def shortage(need: Need, room: Room, ranks: Sequence[Rank], interleaved: bool) -> str | None:
    """What has too little room, with the numbers; None if all fits."""
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
    """Whether the experts' pages must be interleaved over the nodes, for each row to lie on the
    node that computes it would be too much for one of them.

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
    return any(shortage(need, room, ranks, turns) is None for turns in {False, may_interleave})


def _most_kv_cache(need: Need, room: Room, ranks: Sequence[Rank], may_interleave: bool) -> int:
    """The largest KV cache that fits, in whole MiB a rank; 0 for none."""
    unit = len(ranks) << 20
    fitting, least = 0, need.kv_cache // unit
    while fitting < least:
        middle = (fitting + least + 1) // 2
        if fits(replace(need, kv_cache=middle * unit), room, ranks, may_interleave):
            fitting = middle
        else:
            least = middle - 1
    return fitting * unit


def needed(
    tensors: Mapping[str, TensorInfo],
    use: UseWeight | None,
    *,
    layers: int,
    drafts: bool = False,
    resident: Collection[int] | None = None,
    packed_bits: int = 8,
) -> Need:
    """The bytes of a checkpoint's weights, without a KV cache.

    Args:
        tensors: of all files, by name.
        use: LVLLM_MOE_USE_WEIGHT.
        layers: of the model. Later ones are drafts, for speculative decoding.
        drafts: whether those are loaded.
        resident: layers whose experts vLLM has, as they are stored, and not the engine; it has
            those of drafts then, too. None: there is no accelerator.
        packed_bits: of a weight that the checkpoint keeps in 32-bit words.
    """
    experts = others = weights = 0
    for name, tensor in tensors.items():
        layer = layer_number(name)
        draft = _DRAFTS.search(name) is not None or (layer is not None and layer >= layers)
        if draft and not drafts:
            continue
        # The model runs in 16 bits.
        size = tensor.nbytes // (2 if tensor.dtype == torch.float32 else 1)
        theirs = resident is not None and (draft or layer in resident)
        if theirs or _EXPERTS.search(name) is None:
            others += size
            continue
        experts += size
        if _WEIGHTS.search(name):
            packed = {torch.int32: 32 // packed_bits, torch.uint8: 2}
            weights += math.prod(tensor.shape) * packed.get(tensor.dtype, 1)
    int4 = int(weights * INT4_BITS / 8)
    in_memory = {UseWeight.TO_DTYPE: weights * 2, UseWeight.INT4: int4}
    return Need(in_memory.get(use, experts) if use else experts, others, 0, int4)


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

    `engine_cpus` and `omp_cpus` are the logical CPUs of each local rank, `resident` are the layers
    whose experts are the `accelerator`'s. What a GPU holds is not counted, nor experts that
    are `held`: another engine has them in memory, or is about to, and shares them. A prefill engine
    has a copy of all other weights and a cache of `prefill_kv_cache` bytes. Where the sizes
    cannot be known (no safetensors files yet), the answer is `may_interleave`, and memory is only
    checked when it is allocated.

    Raises:
        SettingError: if the model does not fit.
    """
    nodes = {node.id: set(node.cpus) for node in engine.topology().nodes}
    room = Room(bank.available_bytes(), free_on_nodes())
    theirs = None if accelerator == "none" else resident
    need = _need_of(vllm_config, use, len(engine_cpus), theirs)
    if need is None:
        return may_interleave and len(room.nodes) > 1
    if held:
        need = replace(need, experts=0, experts_int4=0)
    if prefill_kv_cache is not None:
        # Beside a GPU the host has only what is on its way.
        rest = 0 if accelerator == "cuda" else need.others + prefill_kv_cache
        need = replace(need, prefill_engine=rest + prefill_kv_cache)

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
    """Of a model without files: whether its parameters, most of them without pages yet, have room
    beside `kv_cache` bytes.

    Raises:
        MemoryError: with the numbers, if they have not.
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
    """Bytes of memory that this process has pages of, page cache apart."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def _check_reserve(cache: Any, need: Need, ranks: Sequence[Rank]) -> None:
    """Without a size for the KV cache, vLLM takes for a rank a share of its node's memory, and for
    the cache what the weights leave of it. It would say only after loading that they leave nothing.
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
    """What the model takes on this host, or None if its files are not there or not readable: what
    is wrong with them is for the loader to say.
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
        packed_bits=_packed_bits(getattr(model.hf_config, "quantization_config", None)),
    )
    # Tensor, pipeline and expert parallel ranks divide the weights; those of data parallelism have
    # the experts in common and each a copy of the rest.
    here = ranks / (parallel.world_size * parallel.data_parallel_size)
    return Need(
        int(need.experts * here),
        int(need.others * ranks / parallel.world_size),
        ranks * (vllm_config.cache_config.kv_cache_memory_bytes or 0),
        int(need.experts_int4 * here),
    )


def folder_of(model: str, revision: str | None) -> Path | None:
    """Where the files of a model are on this machine."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import try_to_load_from_cache

    try:
        config = try_to_load_from_cache(model, "config.json", revision=revision)
    except ValueError:  # not the name of a repository
        return None
    return Path(config).parent if isinstance(config, str) else None


def _packed_bits(quantization: Any) -> int:
    """Bits of a weight in a word; where it cannot be seen, 8: fewer weights than there may be."""
    if not isinstance(quantization, Mapping):
        return 8
    groups = (quantization.get("config_groups") or {}).values()
    bits = [(group.get("weights") or {}).get("num_bits") for group in groups]
    bits.append(quantization.get("bits") or quantization.get("w_bit"))
    return max((int(value) for value in bits if value), default=8)


def free_on_nodes(
    root: Path = Path("/sys/devices/system/node"), allowed: Collection[int] | None = None
) -> dict[int, int]:
    """Bytes that each NUMA node with memory can still give, of those that this process may use (by
    default what its cpuset allows). Empty without NUMA information.
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
