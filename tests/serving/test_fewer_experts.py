"""Fewer experts for a token."""

import json
from pathlib import Path
from typing import Any

import pytest

from lvllm.errors import LvllmError
from lvllm.planning import shape
from lvllm.planning.errors import PlanError
from lvllm.serving.fewer_experts import override, with_fewer
from lvllm.serving.launch import prepare
from tests.planning.made_up import machine

TINY = Path(__file__).parents[2] / "examples/models/tiny-moe"


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"num_experts_per_tok": 8}, {"num_experts_per_tok": 3}),
        ({"moe_topk": 8, "hidden_size": 2}, {"moe_topk": 3}),
        ({"text_config": {"top_k_experts": 8}}, {"text_config": {"top_k_experts": 3}}),
    ],
)
def test_the_field_that_the_model_has(config: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert json.loads(override(config, "config.json", 3)) == wanted
    with pytest.raises(PlanError, match=r"^--experts-per-token 9: allowed are 1 to 8$"):
        override(config, "config.json", 9)


def test_a_config_without_the_field() -> None:
    with pytest.raises(PlanError, match=r"3: config\.json has none of num_experts_per_tok, "):
        override({"model_type": "deepseek_v3"}, "config.json", 3)


def test_a_token_reads_fewer_weights() -> None:
    model = shape.of_folder(TINY, "tiny")
    fewer = with_fewer(model, 2)
    assert model.active - fewer.active == sum(2 * layer.expert for layer in model.layers)
    assert with_fewer(model, 99) == model


def test_the_launch_tells_vllm() -> None:
    launch = prepare([str(TINY)], {}, machine, experts_per_token=2)
    at = launch.command.index("--hf-overrides")
    assert json.loads(launch.command[at + 1]) == {"num_experts_per_tok": 2}
    with pytest.raises(LvllmError, match="exclude each other"):
        prepare([str(TINY), "--hf-overrides", "{}"], {}, machine, experts_per_token=2)
