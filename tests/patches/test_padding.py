"""Tests the mask of padding rows where replicas gather their tokens."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.forward_context import ForwardContext, override_forward_context

from lvllm.patches import padding


def run(
    mask: torch.Tensor | None, rows: int, *, alone: bool = False
) -> tuple[ForwardContext, list[torch.Tensor | None]]:
    """Dispatch and combine two layers, beside another replica with the same rows and logits.

    Returns the context, and the masks between dispatch and combine.
    """
    runner = SimpleNamespace(
        do_naive_dispatch_combine=not alone, moe_config=SimpleNamespace(pcp_size=1)
    )
    copies = 1 if alone else 2

    def gather(_: Any, *tensors: torch.Tensor) -> list[torch.Tensor]:
        return [torch.cat([tensor] * copies) for tensor in tensors]

    dispatch = padding.gather_padding.make(gather)
    combine = padding.restore_padding.make(lambda _self, _shared, rows: rows)
    context = ForwardContext({}, {}, {}, is_padding=mask)
    hidden, logits = torch.randn(rows, 8), torch.randn(rows, 5).bfloat16()
    seen = []
    with override_forward_context(context):
        for _ in range(2):
            hidden_of_all, logits_of_all = dispatch(runner, hidden, logits)
            seen.append(context.is_padding)
            combine(runner, None, hidden_of_all)
    assert torch.equal(hidden_of_all, torch.cat([hidden] * copies))
    assert torch.equal(logits_of_all, torch.cat([logits] * copies))
    assert logits_of_all.is_contiguous()
    return context, seen


def test_the_mask_is_gathered_with_the_tokens() -> None:
    mask = torch.tensor([False, False, True])
    context, seen = run(mask, 3)
    for gathered in seen:
        assert gathered is not None
        assert gathered.tolist() == [False, False, True] * 2
    assert context.is_padding is mask


def test_one_replica_keeps_its_mask() -> None:
    mask = torch.tensor([False, True])
    _, seen = run(mask, 2, alone=True)
    assert all(one is mask for one in seen)


@pytest.mark.parametrize("mask", [None, torch.tensor([False, True, True, True])])
def test_rows_of_another_number_have_no_mask(mask: torch.Tensor | None) -> None:
    context, seen = run(mask, 2)
    assert seen == [None, None]
    assert context.is_padding is mask
