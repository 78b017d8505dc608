"""Tests the rows that pad a batch to a graph's size: no expert is computed for them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.forward_context import ForwardContext, override_forward_context

from lvllm.engine import ExpertLayer
from lvllm.moe.method import HybridMoEMethod


@pytest.mark.parametrize(("variable", "computed"), [("1", [0, 1]), ("0", [0, 1, 2, 3])])
def test_padding_is_skipped_if_vllm_says_which_it_is(
    variable: str, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With VLLM_MOE_SKIP_PADDING=0, vLLM's runner leaves what a dummy run has put in the mask."""
    monkeypatch.setenv("VLLM_MOE_SKIP_PADDING", variable)
    w13, w2 = torch.randn(4, 64, 32).bfloat16(), torch.randn(4, 32, 32).bfloat16()
    experts = ExpertLayer(format="bf16", w13=w13, w2=w2)
    layer = SimpleNamespace(
        engine_handle=experts.handle, expert_map=None, e_score_correction_bias=None
    )
    # The constructor needs a whole vLLM.
    method: Any = HybridMoEMethod.__new__(HybridMoEMethod)
    method.operator, method.moe = torch.ops.lvllm.expert_block, SimpleNamespace(num_experts=4)
    x, weights = torch.randn(4, 32).bfloat16(), torch.ones(4, 1)
    ids = torch.arange(4, dtype=torch.int32).unsqueeze(1)
    padding = torch.tensor([False, False, True, True])
    with override_forward_context(ForwardContext({}, {}, {}, is_padding=padding)):
        out = method.apply(layer, x, weights, ids, None, None)
    assert out.any(1).nonzero().flatten().tolist() == computed
