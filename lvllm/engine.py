"""The Python face of lk: the expert block of a Mixture-of-Experts layer on the CPU.

Usable without vLLM::

    layer = ExpertLayer(format="bf16", w13=w13, w2=w2)
    y = layer(x, topk_ids, topk_weights)

E experts, H hidden, I intermediate, M tokens, k experts a token.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

Activation = Literal["silu", "gelu", "gelu_tanh"]
Binding = Literal["CPU_CORE", "NUMA_NODE"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Weight dtype of each format that the engine computes."""

_LIBRARY = Path(__file__).with_name("_engine.so")
if not _LIBRARY.exists():
    raise ImportError(f"{_LIBRARY} is missing: build it with `pip install -e .`")
torch.ops.load_library(str(_LIBRARY))
raw_ops = torch.ops.lvllm


@torch.library.register_fake("lvllm::expert_block")
def _expert_block_fake(
    x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, layer: torch.Tensor
) -> torch.Tensor:
    return x.new_empty(x.shape)


class ExpertLayer:
    """The routed experts of one layer.

    Args:
        format: how the weights are stored, "bf16" or "fp16".
        w13: [E, 2I, H] in the format's dtype, contiguous, on the CPU: for each expert the gate
            rows, then the up rows.
        w2: [E, H, I], likewise.
        activation: of the gate: "silu", "gelu" (exact) or "gelu_tanh".
        apply_router_weight_on_input: scale x by the router's weight instead of the expert's output.

    The layer keeps the tensors and computes on their memory; `lvllm.bank.allocate` gives memory
    that is fast to compute on. Sums are in float32. On AVX-512 BF16 the bf16 format rounds x and
    the activated intermediate to bf16, everywhere else they stay float32; the relative Frobenius
    error against float32 is below 3e-3 in both formats, most of it the rounding of the result.
    A token's result depends neither on threads and NUMA nodes nor on the other tokens in the batch.

    Raises:
        ValueError: naming the argument, what came and what is allowed.
    """

    def __init__(
        self,
        *,
        format: str,
        w13: torch.Tensor,
        w2: torch.Tensor,
        w13_scale: torch.Tensor | None = None,
        w2_scale: torch.Tensor | None = None,
        activation: str = "silu",
        apply_router_weight_on_input: bool = False,
    ) -> None:
        _check_choice("format", format, tuple(DTYPES))
        _check_choice("activation", activation, get_args(Activation))
        for name, scale in (("w13_scale", w13_scale), ("w2_scale", w2_scale)):
            if scale is not None:
                raise ValueError(f"{name} was given, but format {format} has no scales")
        _check_weights("w13", w13, DTYPES[format])
        _check_weights("w2", w2, DTYPES[format])
        experts, rows, hidden = w13.shape
        if rows % 2 != 0:
            raise ValueError(f"w13 has {rows} rows an expert, wanted an even number: gate, then up")
        if tuple(w2.shape) != (experts, hidden, rows // 2):
            raise ValueError(
                f"w2 has shape {tuple(w2.shape)}, w13 of {tuple(w13.shape)} wants "
                f"{(experts, hidden, rows // 2)}"
            )
        self.format = format
        self.activation = activation
        self.num_experts, self.hidden_size, self.intermediate_size = experts, hidden, rows // 2
        self._weights = (w13, w2)
        handle: int = raw_ops.layer_create(
            w13, w2, format, activation, apply_router_weight_on_input
        )
        self.handle = torch.tensor(handle, dtype=torch.int64)
        """int64 scalar that names the layer to `torch.ops.lvllm.expert_block`."""
        # The engine forgets the layer before the tensors go.
        self._finalizer = weakref.finalize(self, raw_ops.layer_destroy, handle)
        self._finalizer.atexit = False

    def __call__(
        self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> torch.Tensor:
        """Sum over j of topk_weights[:, j] * expert topk_ids[:, j] of x.

        Args:
            x: [M, H] bfloat16 or float16; each row contiguous.
            topk_ids: [M, k] int32 or int64; -1 skips the slot.
            topk_weights: [M, k] float32.

        Returns:
            [M, H] in x's dtype.

        Raises:
            ValueError: for a wrong shape or dtype, or an id that is no expert.
        """
        out: torch.Tensor = raw_ops.expert_block(x, topk_ids, topk_weights, self.handle)
        return out


@dataclass(frozen=True)
class Node:
    """A NUMA node as this process may use it."""

    id: int
    """The kernel's number."""
    cores: tuple[tuple[int, ...], ...]
    """The CPUs of each physical core: the first, then its SMT siblings. Empty: memory only."""
    memory_bytes: int

    @property
    def cpus(self) -> tuple[int, ...]:
        return tuple(sorted(cpu for core in self.cores for cpu in core))


@dataclass(frozen=True)
class Topology:
    """The machine after the cgroup's cpuset and the process's CPU affinity."""

    nodes: tuple[Node, ...]

    @property
    def physical_cores(self) -> int:
        return sum(len(node.cores) for node in self.nodes)

    @property
    def cpus(self) -> tuple[int, ...]:
        return tuple(sorted(cpu for node in self.nodes for cpu in node.cpus))


@dataclass(frozen=True)
class EngineInfo:
    """What the engine runs on."""

    isa: str
    """"portable", "avx2" or "avx512_bf16"."""
    threads: int
    """Workers, the calling thread included."""
    nodes: tuple[int, ...]
    """NUMA nodes in use, by the kernel's number."""
    cpus: tuple[tuple[int, ...], ...]
    """Where each worker may run. The caller is one of them, but is not pinned: it counts as the
    worker of the core that it happens to be on."""
    worker_nodes: tuple[int, ...]
    """The node of each worker."""
    huge_pages: bool
    """Whether the kernel gives transparent huge pages to memory that asks for them."""
    binding: str
    power_saving: bool


def configure(
    threads: int | None = None,
    binding: str = "CPU_CORE",
    power_saving: bool = False,
    cpus: Sequence[int] | None = None,
    topology: str | None = None,
    isa: str | None = None,
) -> None:
    """Sets up the engine of this process. Without it, the first use takes the defaults.

    A later call with other values waits for a running call and starts the threads anew. Weights
    keep the place that they were allocated in, so call it before `lvllm.bank.allocate`.

    Args:
        threads: workers, the calling thread included; default one for each physical core.
        binding: "CPU_CORE" pins each worker to a core, "NUMA_NODE" to the cores of its node.
        power_saving: workers sleep as soon as a call ends, instead of spinning for 50 us first.
        cpus: run on these CPUs only; default all that the process may use.
        topology: a made-up machine for tests, "2 nodes x 3 cores x 2 threads" or, uneven,
            "2 nodes x 3,1 cores x 2 threads": its threads are not pinned, memory is not placed.
        isa: "portable", "avx2" or "avx512_bf16"; default the variable LK_ISA, else the best that
            the CPU runs.

    Raises:
        ValueError: naming the argument, what came and what is allowed.
    """
    _check_choice("binding", binding, get_args(Binding))
    if threads is not None and threads < 1:
        raise ValueError(f"threads is {threads}, must be at least 1")
    if cpus is not None and len(cpus) == 0:
        raise ValueError("cpus is empty, must name at least one CPU")
    raw_ops.configure(
        threads or 0, binding, power_saving, list(cpus or ()), topology or "", isa or ""
    )


def info() -> EngineInfo:
    """What the engine runs on; starts it if it does not run yet."""
    raw = json.loads(raw_ops.info())
    workers = raw["workers"]
    return EngineInfo(
        isa=raw["isa"],
        threads=len(workers),
        nodes=tuple(raw["nodes"]),
        cpus=tuple(tuple(worker["cpus"]) for worker in workers),
        worker_nodes=tuple(worker["node"] for worker in workers),
        huge_pages=_transparent_huge_pages(),
        binding=raw["binding"],
        power_saving=raw["power_saving"],
    )


def topology() -> Topology:
    """The machine that the engine sees: nodes, cores, SMT siblings, memory. Starts no thread."""
    return Topology(
        tuple(
            Node(node["id"], tuple(tuple(core) for core in node["cores"]), node["memory_bytes"])
            for node in json.loads(raw_ops.topology())
        )
    )


def _transparent_huge_pages() -> bool:
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return False
    return "[never]" not in text


def _check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, must be one of {', '.join(allowed)}")


def _check_weights(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise ValueError(f"{name} is {tensor.dtype}, wanted {dtype}")
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} is on {tensor.device}, wanted the CPU")
    if tensor.dim() != 3 or 0 in tensor.shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, wanted [experts, rows, columns]")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}, wanted a contiguous tensor")
