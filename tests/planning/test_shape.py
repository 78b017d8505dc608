"""Sizes of models, from config.json and from files."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.plans.models import MODELS, shape_of
from lvllm.checkpoint.headers import Checkpoint
from lvllm.planning import shape
from lvllm.planning.errors import PlanError

SMALL = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 1,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
TINY = Path(__file__).parents[2] / "examples/models/tiny-moe"


@pytest.mark.parametrize("published", MODELS, ids=lambda one: one.name)
def test_published_models_have_as_many_weights_as_their_makers_say(published: Any) -> None:
    model = shape_of(published.name)
    assert (model.routed + model.others) / 1e9 == pytest.approx(published.weights, rel=2e-3)


def test_active_weights() -> None:
    # The makers' names say so many, with the embedding, which is looked up and not multiplied.
    active = {"Qwen3-235B-A22B-FP8": 22.2, "DeepSeek-R1": 37.5, "Qwen3-30B-A3B": 3.35}
    for name, billions in active.items():
        model = shape_of(name)
        assert (model.active + model.embedding) / 1e9 == pytest.approx(billions, rel=0.01)


def test_what_cards_divide() -> None:
    # 32 heads, 4 KV heads and 768 rows; 128 heads and 2048 rows.
    assert [shape_of("Qwen3-30B-A3B").cards(most) for most in (1, 3, 7, 8)] == [1, 2, 4, 8]
    assert [shape_of("DeepSeek-R1").cards(most) for most in (3, 6, 16)] == [2, 4, 16]


def test_latent_attention() -> None:
    model = shape_of("DeepSeek-R1")
    # 512 latent values and 64 of the rotary key, in 61 layers and 2 bytes each.
    assert model.cache_bytes(1000) == 1000 * 61 * 576 * 2
    layer = model.layers[30]
    assert layer.attended == 128 * (2 * 512 + 64)
    assert layer.attended_in_prompts == 128 * (128 + 64 + 128)


def test_experts_without_weights_take_no_memory() -> None:
    """transformers' own sizes are those of LongCat-Flash, whose config.json has no model_type."""
    named = {"model_type": "longcat_flash"}
    model = shape.of_config({"architectures": ["LongcatFlashForCausalLM"]}, "x")
    assert model == shape.of_config(named, "x")
    assert (model.routed + model.others) / 1e9 == pytest.approx(560, rel=5e-3)
    assert len(model.layers) == 28
    layer = model.layers[3]
    # A token chooses 12 of 768 experts, of which 512 have weights.
    assert (layer.experts, layer.chosen, layer.expert) == (512, 8, 3 * 6144 * 2048)
    assert model.active / 1e9 == pytest.approx(27, rel=0.01)  # its makers' average
    assert model.cache_bytes(1000) == 1000 * 28 * 2 * 576 * 2  # attention twice in each layer
    assert layer.attended == 2 * 64 * (2 * 512 + 64)
    plain = shape.of_config(named | {"zero_expert_num": 0}, "x")
    assert (plain.layers[3].chosen, plain.routed) == (12, model.routed)


def test_sliding_windows_and_linear_attention_keep_less() -> None:
    gpt_oss = shape_of("gpt-oss-120b")  # 36 layers, every second of which looks back 128 tokens
    each = 2 * 8 * 64 * 2  # keys and values of 8 heads, 64 each, 2 bytes
    assert gpt_oss.cache_bytes(4096) == each * 18 * (4096 + 128)
    qwen = shape_of("Qwen3-Next-80B-A3B")  # every fourth of 48 layers has full attention
    assert qwen.cache_bytes(100) == 12 * 100 * 2 * 2 * 256 * 2


def test_a_folder_counts_the_bits_of_its_files() -> None:
    model = shape.of_folder(TINY, "tiny")
    tensors = Checkpoint.open(TINY).tensors.values()
    assert model.bits.experts == 16
    found = model.routed * model.bits.experts / 8 + model.others * model.bits.others / 8
    assert found == sum(tensor.nbytes for tensor in tensors)
    config = json.loads((TINY / "config.json").read_text())
    assert model.routed == sum(
        3 * config["hidden_size"] * config["moe_intermediate_size"] * config["num_experts"]
        for _ in range(config["num_hidden_layers"])
    )


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "no_such_model"}, "x: transformers does not know the model_type"),
        ({}, "x: transformers does not know the model_type null"),
        ({"model_type": "llama", "num_hidden_layers": 1}, "x: the model has no routed experts"),
        ({"model_type": "qwen3_moe", "hidden_size": "big"}, "x: transformers does not build"),
        ({"architectures": [["x"]]}, "x: transformers does not know the model_type null"),
        ({"model_type": {"a": 1}}, "x: transformers does not know the model_type"),
        ({"model_type": "mixtral", "num_hidden_layers": 1 << 40}, "x: transformers does not build"),
        ({"model_type": "mixtral", "text_config": 7}, "x: transformers does not build"),
        (SMALL | {"num_experts_per_tok": 9}, "x: num_experts_per_tok in config.json is 9, a whole"),
        (SMALL | {"moe_intermediate_size": 0}, "x: the 4 experts of layer 0 are empty"),
        (SMALL | {"max_position_embeddings": 10**400}, "x: max_position_embeddings in config.json"),
        (
            {
                "model_type": "mixtral",
                "num_hidden_layers": 1,
                "quantization_config": {"quant_method": "bitsandbytes"},
            },
            "quant_method 'bitsandbytes' is none of those that LvLLM reads: ",
        ),
    ],
)
def test_what_cannot_be_planned_is_said_in_one_line(config: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError) as error:
        shape.of_config(config, "x")
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["{", "[1]", "\udcff", '"text"'])
def test_a_broken_config_names_its_file(content: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(PlanError, match=r"config\.json: "):
        shape.of_folder(tmp_path, "x")


def test_numbered_experts_count_as_stacked_ones() -> None:
    class Config:
        num_experts_per_tok = 2
        num_attention_heads = 4

    import torch

    stacked = {
        "mlp.experts.gate_up_proj": torch.Size([8, 20, 6]),
        "mlp.gate.weight": torch.Size([8, 6]),
    }
    numbered = {f"mlp.experts.{i}.gate_up_proj.weight": torch.Size([20, 6]) for i in range(8)}
    numbered["mlp.gate.weight"] = torch.Size([8, 6])
    found = [
        shape._layer(parameters, shape._Fields(Config(), "x"), 0)
        for parameters in (stacked, numbered)
    ]
    assert found[0] == found[1]
    assert (found[0].experts, found[0].expert, found[0].others) == (8, 120, 48)
