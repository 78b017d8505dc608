"""Experts without weights, as the patched router of vLLM treats them on CPUs."""

import pytest
import torch

pytest.importorskip("vllm")
from vllm.model_executor.layers.fused_moe.router.zero_expert_router import ZeroExpertRouter

from lvllm.patches.routing import route_to_zero_experts

ROUTED, ZERO, CHOSEN, HIDDEN, SCALE = 5, 3, 4, 16, 2.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_experts_without_weights_give_their_input(dtype: torch.dtype) -> None:
    """Each token against a loop over its experts, in float64."""
    x = torch.randn(40, HIDDEN).to(dtype)
    logits, bias = torch.randn(40, ROUTED + ZERO), torch.rand(ROUTED + ZERO) / 10
    router = ZeroExpertRouter(
        top_k=CHOSEN,
        global_num_experts=ROUTED,
        e_score_correction_bias=torch.nn.Parameter(bias),
        num_logical_experts=ROUTED,
        zero_expert_type="identity",
        routed_scaling_factor=SCALE,
    )
    route = route_to_zero_experts.make(ZeroExpertRouter._compute_routing)
    with torch.no_grad():
        weights, ids = route(router, x, logits, torch.int32)
    given = router.zero_expert_output
    assert given is not None
    assert (ids.dtype, given.dtype) == (torch.int32, dtype)
    assert router.zero_expert_output is None  # vLLM adds it once
    zeros = 0
    for token in range(len(x)):
        scores = logits[token].double().softmax(0)
        best = (scores + bias.double()).topk(CHOSEN).indices.tolist()
        wanted = {expert: scores[expert].item() * SCALE for expert in best if expert < ROUTED}
        pairs = zip(ids[token].tolist(), weights[token].tolist(), strict=True)
        found = {expert: weight for expert, weight in pairs if (expert, weight) != (0, 0)}
        assert found == pytest.approx(wanted, rel=1e-5)
        factor = sum(scores[expert].item() * SCALE for expert in best if expert >= ROUTED)
        torch.testing.assert_close(given[token], (x[token].double() * factor).to(dtype))
        zeros += CHOSEN - len(wanted)
    assert 0 < zeros < CHOSEN * len(x)
