"""Computes the experts of a layer on a device, from weights that were copied there as lk has them.

A few experts at a time are converted to plain matrices of the model's dtype, and multiplied with
the rows of their tokens by PyTorch's grouped product. The scratch memory for these matrices is
bounded, since all experts of a layer may take ten times as much. Arithmetic in 16 bits costs little
here. By count (a bus of 55 GB/s, 600 TFLOP/s), the copy of a layer of Qwen3-30B takes six (int4) to
twenty times (bf16) as long as the products of 8192 tokens.
"""

from collections.abc import Iterator, Mapping

import torch
from torch.nn import functional as F

from lvllm.engine.expert_layer import ExpertLayer
from lvllm.gpu.convert import convert

__all__ = ["SCRATCH_BYTES", "run"]

SCRATCH_BYTES = 512 << 20
"""The limit of converted matrices at a time. Writing this much takes 0.1 ms, and starting the few
kernels takes 20 us."""


def run(
    layer: ExpertLayer,
    tensors: Mapping[str, torch.Tensor],
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    *,
    scratch_bytes: int = SCRATCH_BYTES,
) -> torch.Tensor:
    """Compute what `layer(x, topk_ids, topk_weights)` computes, on the device of x and `tensors`.

    The host waits for the device once, to learn how many tokens each expert has.

    Args:
        layer: gives sizes, format and activation; its own memory is not read.
        tensors: copies of `layer.tensors` on the device of the other arguments.
        x: [M, H] bfloat16 or float16.
        topk_ids: [M, k] int32 or int64; -1 skips the slot.
        topk_weights: [M, k] float32.
        scratch_bytes: the limit of converted matrices at a time. One expert is always converted.

    Returns:
        [M, H] in x's dtype. Sums over k are in float32, in the order of the slots.

    Raises:
        ValueError: for an id that is neither an expert nor -1.
    """
    k = topk_ids.shape[1]
    # Pairs of a token and a slot, in the order of their experts. Skipped slots come first.
    experts, pairs = topk_ids.flatten().long().sort(stable=True)
    # starts[e] is the first pair of expert e, starts[-1] is the end of the last expert's pairs. The
    # search, unlike torch.bincount, does not make the host wait for the device.
    bounds = torch.arange(-1, layer.num_experts + 1, device=x.device)
    below, *starts = (on_device := torch.searchsorted(experts, bounds)).tolist()
    if below or starts[-1] < pairs.numel():
        wrong = experts[0 if below else -1].item()
        raise ValueError(f"topk_ids has {wrong}, must be -1 or in [0, {layer.num_experts})")
    ends_on_device = on_device[2:]
    weights = topk_weights.flatten()[pairs].unsqueeze(1)
    rows = x.new_zeros(pairs.numel(), layer.hidden_size)
    for some in _chunks(layer, x.dtype, scratch_bytes):
        begin, end = starts[some.start], starts[some.stop]
        if end == begin:
            continue
        of_each = [starts[expert + 1] - starts[expert] for expert in some]
        # This uses the numbers on the device: copying them from the host would make the host wait.
        ends = (ends_on_device[some.start : some.stop] - begin).int()
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
    return rows.unflatten(0, (-1, k)).sum(1, dtype=torch.float32).to(x.dtype)


def _chunks(layer: ExpertLayer, dtype: torch.dtype, scratch_bytes: int) -> Iterator[range]:
    """Yield consecutive experts whose matrices fit in the scratch memory."""
    projections = layer.parts + 1
    expert = projections * layer.hidden_size * layer.intermediate_size * dtype.itemsize
    count = max(1, scratch_bytes // expert)
    for first in range(0, layer.num_experts, count):
        yield range(first, min(first + count, layer.num_experts))


def _product(
    a: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor, counts: list[int]
) -> torch.Tensor:
    """Multiply the rows of a [P, K] with matrices [n, N, K] -> [P, N].

    The first counts[0] rows belong to the first matrix, and so on; `ends` has the sums of `counts`.
    """
    if all(size * a.element_size() % 16 == 0 for size in matrices.shape[1:]):
        return F.grouped_mm(a, matrices.transpose(1, 2), offs=ends)
    # The grouped product requires rows that begin at multiples of 16 bytes.
    parts = a.split(counts)
    return torch.cat([part @ matrix.T for part, matrix in zip(parts, matrices, strict=True)])


def _add(h: torch.Tensor, bias: torch.Tensor | None, owner: torch.Tensor) -> torch.Tensor:
    """Add to each row of h [P, N] the bias [E, N] of its expert; `owner` [P] has the experts."""
    return h if bias is None else h + bias[owner]


def _activate(layer: ExpertLayer, h: torch.Tensor) -> torch.Tensor:
    """Apply the activation, as `ExpertLayer` defines it, to float32 [P, gate and up] -> [P, I]."""
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
