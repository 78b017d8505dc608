"""What is said of a model whose experts do not run on lk."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from lvllm.worker import experts


class Experts(RoutedExperts):
    """A layer of experts, without its weights."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)


@pytest.mark.parametrize(
    ("layer", "stages", "warned"),
    [(torch.nn.Linear, 1, True), (torch.nn.Linear, 2, False), (Experts, 1, False)],
)
def test_a_model_that_computes_its_experts_is_named(
    layer: Any, stages: int, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(experts.logger, "warning", lambda text, *of: said.append(text % of))
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(pipeline_parallel_size=stages),
        model_config=SimpleNamespace(model="folder/jet"),
    )
    made = layer(2, 2) if layer is torch.nn.Linear else layer()
    experts.warn_if_none_are_ours(config, torch.nn.Sequential(made))
    assert len(said) == warned
    assert all(
        "no experts of folder/jet run on lk, because its class Sequential" in one for one in said
    )
