"""Computes vLLM's operators for CUDA that choose the experts of each token.

In all of them `weights` is float32 and `ids` of any integer type, both [tokens, topk], and written.
A bias [experts] counts for the choice, and not for the weights. Padding [tokens] is given the ids
-1, which stand for no expert.
"""

import torch
from torch import Tensor

__all__ = ["grouped_topk", "topk_sigmoid", "topk_softmax"]


def topk_softmax(
    weights: Tensor,
    ids: Tensor,
    _: Tensor,
    logits: Tensor,
    renormalize: bool = False,
    bias: Tensor | None = None,
    padding: Tensor | None = None,
) -> None:
    scores = torch.softmax(logits.float(), -1)
    _choose(weights, ids, scores, _biased(scores, bias), renormalize)
    _skip(ids, padding)


def topk_sigmoid(
    weights: Tensor,
    ids: Tensor,
    _: Tensor,
    logits: Tensor,
    renormalize: bool = False,
    bias: Tensor | None = None,
    scale: float = 1.0,
    padding: Tensor | None = None,
) -> None:
    scores = torch.sigmoid(logits.float())
    _choose(weights, ids, scores, _biased(scores, bias), renormalize)
    weights *= scale
    _skip(ids, padding)


def grouped_topk(
    weights: Tensor,
    ids: Tensor,
    scores: Tensor,
    groups: int,
    kept: int,
    renormalize: bool,
    scale: float,
    bias: Tensor,
    function: int,
) -> None:
    """Choose among the experts of the `kept` groups whose best two have the largest sums.

    Scores are logits if `function` is 1, the sigmoid.
    """
    values = torch.sigmoid(scores.float()) if function == 1 else scores.float()
    chosen_by = _biased(values, bias)
    of_groups = chosen_by.unflatten(-1, (groups, -1))
    best = of_groups.topk(min(2, of_groups.shape[-1]), -1).values.sum(-1)
    out = torch.ones_like(best, dtype=torch.bool).scatter_(-1, best.topk(kept, -1).indices, False)
    chosen_by = of_groups.masked_fill(out.unsqueeze(-1), float("-inf")).flatten(-2)
    _choose(weights, ids, values, chosen_by, renormalize)
    weights *= scale


def _biased(scores: Tensor, bias: Tensor | None) -> Tensor:
    return scores if bias is None else scores + bias.float()


def _choose(
    weights: Tensor, ids: Tensor, scores: Tensor, chosen_by: Tensor, renormalize: bool
) -> None:
    chosen = chosen_by.topk(weights.shape[-1], -1).indices
    values = scores.gather(-1, chosen)
    weights.copy_(values / values.sum(-1, keepdim=True) if renormalize else values)
    ids.copy_(chosen)


def _skip(ids: Tensor, padding: Tensor | None) -> None:
    if padding is not None:
        ids.masked_fill_(padding.bool().unsqueeze(-1), -1)
