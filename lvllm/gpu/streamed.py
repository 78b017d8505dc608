"""The expert block on a device, from weights that have been copied there in the engine's order.

Experts are taken some at a time, converted to plain matrices of the model's dtype, and multiplied
with the rows of their tokens by PyTorch's grouped product. The scratch memory for the matrices is
bounded; a layer's experts may take ten times as much. Arithmetic in 16 bits costs little: by count
(55 GB/s of bus, 600 TFLOP/s), the copy of a layer of Qwen3-30B takes six (int4) to twenty times
(bf16) as long as the products of 8192 tokens.
"""

from collections.abc import Iterator, Mapping

import torch
from torch.nn import functional as F

from lvllm.engine.expert_layer import ExpertLayer
from lvllm.gpu.convert import convert

__all__ = ["SCRATCH_BYTES", "run"]

SCRATCH_BYTES = 512 << 20
"""Of converted matrices at once: 0.1 ms to write, against 20 us to begin a few kernels."""


def run(
    layer: ExpertLayer,
    tensors: Mapping[str, torch.Tensor],
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    *,
    scratch_bytes: int = SCRATCH_BYTES,
) -> torch.Tensor:
    """What `layer(x, topk_ids, topk_weights)` computes, on the device of `tensors` and x.

    The host waits once for the ids, to know which experts have tokens.

    Args:
        layer: for its sizes, format and activation; its own memory is not touched.
        tensors: those of `layer.tensors`, on the device of the other arguments.
        x: [M, H] bfloat16 or float16.
        topk_ids: [M, k] int32 or int64; -1 skips the slot.
        topk_weights: [M, k] float32.
        scratch_bytes: of converted matrices at once; at least one expert's are made.

    Returns:
        [M, H] in x's dtype. Sums over k are in float32, in the order of the slots.
    """
    k = topk_ids.shape[1]
    # Pairs of token and slot, those of an expert side by side; without one they come first.
    experts, pairs = topk_ids.flatten().long().sort(stable=True)
    on_device = torch.bincount(experts + 1, minlength=layer.num_experts + 1)
    counts = on_device.tolist()
    weights = topk_weights.flatten()[pairs].unsqueeze(1)
    rows = x.new_zeros(pairs.numel(), layer.hidden_size)
    begin = counts[0]
    for some in _chunks(layer, x.dtype, scratch_bytes):
        of_each = counts[1 + some.start : 1 + some.stop]
        end = begin + sum(of_each)
        if end == begin:
            continue
        # From what is there: numbers that come from the host would make it wait for the device.
        ends = on_device[1 + some.start : 1 + some.stop].cumsum(0, dtype=torch.int32)
        a = x[pairs[begin:end] // k]
        if layer.apply_router_weight_on_input:
            a = (a * weights[begin:end]).to(x.dtype)
        owner = experts[begin:end]
        h = _product(a, convert(layer, tensors, "w13", some, x.dtype), ends, of_each)
        h = _activate(layer, _add(h.float(), tensors.get("w13_bias"), owner)).to(x.dtype)
        y = _product(h, convert(layer, tensors, "w2", some, x.dtype), ends, of_each)
        y = _add(y.float(), tensors.get("w2_bias"), owner)
        if not layer.apply_router_weight_on_input:
            y *= weights[begin:end]
        rows[pairs[begin:end]] = y.to(x.dtype)
        begin = end
    return rows.unflatten(0, (-1, k)).sum(1, dtype=torch.float32).to(x.dtype)


def _chunks(layer: ExpertLayer, dtype: torch.dtype, scratch_bytes: int) -> Iterator[range]:
    """Consecutive experts whose matrices fit into the scratch memory."""
    projections = layer.parts + 1
    expert = projections * layer.hidden_size * layer.intermediate_size * dtype.itemsize
    count = max(1, scratch_bytes // expert)
    for first in range(0, layer.num_experts, count):
        yield range(first, min(first + count, layer.num_experts))


def _product(
    a: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor, counts: list[int]
) -> torch.Tensor:
    """a [P, K], whose rows belong to matrices [n, N, K], `counts` to each -> [P, N]."""
    if all(size * a.element_size() % 16 == 0 for size in matrices.shape[1:]):
        return F.grouped_mm(a, matrices.transpose(1, 2), offs=ends)
    # The grouped product wants rows that begin at multiples of 16 bytes.
    parts = a.split(counts)
    return torch.cat([part @ matrix.T for part, matrix in zip(parts, matrices, strict=True)])


def _add(h: torch.Tensor, bias: torch.Tensor | None, owner: torch.Tensor) -> torch.Tensor:
    """h [P, N] and the biases [E, N] of the experts [P] that its rows belong to."""
    return h if bias is None else h + bias[owner]


def _activate(layer: ExpertLayer, h: torch.Tensor) -> torch.Tensor:
    """float32 [P, gate and up] -> [P, I]; what the names mean is said at `ExpertLayer`."""
    if layer.activation == "relu2":
        return h.relu().square()
    gate, up = h.chunk(2, dim=1)
    alpha, beta, limit = layer.swiglu
    match layer.activation:
        case "silu":
            return F.silu(gate) * up
        case "gelu":
            return F.gelu(gate) * up
        case "gelu_tanh":
            return F.gelu(gate, approximate="tanh") * up
        case "swiglustep":
            return F.silu(gate).clamp(max=limit) * up.clamp(-limit, limit)
    gate = gate.clamp(max=limit)
    return (up.clamp(-limit, limit) + beta) * gate * torch.sigmoid(alpha * gate)
