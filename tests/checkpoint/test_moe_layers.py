"""Which layers of a model have experts, and how their numbers are read and written."""

from types import SimpleNamespace
from typing import Any

import pytest

from lvllm.checkpoint.headers import CheckpointError
from lvllm.checkpoint.moe_layers import layer_number, moe_layers


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),  # Mixtral, OLMoE, MiniMax
        ({"first_k_dense_replace": 3, "moe_layer_freq": 1}, [3, 4, 5]),  # DeepSeek-V3
        ({"first_k_dense_replace": 1, "moe_layer_freq": 2}, [2, 4]),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, [1, 5]),  # Qwen
        ({"decoder_sparse_step": 1, "mlp_only_layers": []}, [0, 1, 2, 3, 4, 5]),
        ({"mlp_layer_types": ["dense", "sparse"] * 3}, [1, 3, 5]),  # GLM, EXAONE
        ({"hybrid_override_pattern": "MEM*-E"}, [1, 5]),  # Nemotron-H
        ({"moe_layers_enum": "4,5"}, [4, 5]),  # Step-3
        ({"moe_layer_freq": [0, 1, 1, 1, 1, 0]}, [1, 2, 3, 4]),  # MiMo
        ({"first_k_dense_replace": None}, [0, 1, 2, 3, 4, 5]),
        ({"model_type": "longcat_flash", "num_layers": 3}, [0, 1, 2]),  # attention counts twice
    ],
)
def test_families(fields: dict[str, Any], expected: list[int]) -> None:
    assert moe_layers(SimpleNamespace(num_hidden_layers=6, **fields)) == expected


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_hidden_layers": 1 << 40}, "num_hidden_layers is 1099511627776: "),
        ({"mlp_layer_types": ["dense"] * 5}, 'mlp_layer_types is ["dense", '),
        ({"hybrid_override_pattern": 0.5}, "hybrid_override_pattern is 0.5: "),
        ({"mlp_only_layers": "3"}, "mlp_only_layers is '3': "),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0: "),
        ({"moe_layers_enum": "1,x"}, "moe_layers_enum is '1,x': "),
        ({"moe_layer_freq": [1]}, "moe_layer_freq is [1]: one entry for each of 6 layers"),
    ],
)
def test_fields_that_mean_nothing_are_named(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        moe_layers(SimpleNamespace(**({"num_hidden_layers": 6} | fields)))
    assert str(caught.value).startswith(f"config.json: {said}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("model.layers.3.mlp.experts", 3),
        ("language_model.model.layers.17.mlp.experts", 17),
        ("backbone.layers.0.mixer.experts.7.up_proj.weight", 0),
        ("model.layers.61", 61),
        ("mtp.layers.0.mlp.experts", 0),
        ("draft_model.model.layers.2.mlp.experts", 2),
        ("visual.blocks.4.mlp.weight", None),
        ("model.embed_tokens.weight", None),
        ("model.my_layers.4.mlp", None),
        ("model.layers.norm", None),
        (f"model.layers.{'9' * 5000}.mlp", None),
    ],
)
def test_numbers_of_layers(name: str, number: int | None) -> None:
    assert layer_number(name) == number
