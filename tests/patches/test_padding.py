"""Tests the mask of padding rows where replicas gather their tokens."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.forward_context import ForwardContext, override_forward_context

from lvllm.patches import padding

LOGITS = 5


def run(
    mask: torch.Tensor | None, rows: int, *, alone: bool = False, sequence_parallel: bool = False
) -> tuple[ForwardContext, list[torch.Tensor | None], int]:
    """Dispatch and combine two layers, beside another replica with the same rows and logits.

    Returns the context, the masks between dispatch and combine, and the columns that are gathered.
    """
    runner = SimpleNamespace(
        do_naive_dispatch_combine=not alone,
        moe_config=SimpleNamespace(is_sequence_parallel=sequence_parallel),
    )
    copies = 1 if alone else 2
    columns = 0

    def gather(_: Any, *tensors: torch.Tensor) -> list[torch.Tensor]:
        nonlocal columns
        columns = tensors[1].shape[1]
        return [torch.cat([tensor] * copies) for tensor in tensors]

    dispatch = padding.gather_padding.make(gather)
    combine = padding.restore_padding.make(lambda _self, _shared, rows: rows)
    context = ForwardContext({}, {}, {}, is_padding=mask)
    hidden, logits = torch.randn(rows, 8), torch.randn(rows, LOGITS).bfloat16()
    seen = []
    with override_forward_context(context):
        for _ in range(2):
            hidden_of_all, logits_of_all = dispatch(runner, hidden, logits)
            seen.append(context.is_padding)
            combine(runner, None, hidden_of_all)
    assert torch.equal(hidden_of_all, torch.cat([hidden] * copies))
    assert torch.equal(logits_of_all, torch.cat([logits] * copies))
    assert logits_of_all.is_contiguous()
    return context, seen, columns


def test_the_mask_is_gathered_with_the_tokens() -> None:
    mask = torch.tensor([False, False, True])
    context, seen, columns = run(mask, 3)
    assert columns == LOGITS + 1
    for gathered in seen:
        assert gathered is not None
        assert gathered.tolist() == [False, False, True] * 2
    assert context.is_padding is mask


def test_one_replica_keeps_its_mask() -> None:
    mask = torch.tensor([False, True])
    _, seen, _ = run(mask, 2, alone=True)
    assert all(one is mask for one in seen)


@pytest.mark.parametrize(
    ("mask", "rows"),
    [
        (None, 2),
        (torch.tensor([False, True, True]), 2),
        # A replica with one token, whose rank has all of its rows.
        (torch.tensor([False]), 1),
    ],
)
def test_all_ranks_gather_as_many_columns(mask: torch.Tensor | None, rows: int) -> None:
    """With sequence parallelism no rank adds the mask, whatever its rows are."""
    context, seen, columns = run(mask, rows, sequence_parallel=mask is not None)
    assert columns == LOGITS
    assert seen == [None, None]
    assert context.is_padding is mask
