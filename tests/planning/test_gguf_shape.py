"""Sizes of models, from the headers of GGUF files."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type

from lvllm.checkpoint.headers import Checkpoint
from lvllm.checkpoint.moe_layers import layer_number
from lvllm.formats.gguf import TYPES
from lvllm.planning import gguf_shape, shape
from lvllm.planning.bits import FormatShare
from lvllm.planning.errors import PlanError
from lvllm.planning.gguf_bits import Stored
from lvllm.planning.settings import unserved
from lvllm.planning.shape import UNLIMITED
from tests.models.make import make
from tests.planning.gguf_files import of_checkpoint, small, write

# The fields of attention, and of how many experts a token takes, as tests/models/make.py has them.
PLAIN = {"attention.head_count": 4, "attention.head_count_kv": 2}
OLD_LATENT = {
    **{"attention.head_count": 4, "attention.head_count_kv": 4, "attention.kv_lora_rank": 512},
    **{"attention.key_length": 192, "attention.value_length": 128},
}
LATENT = {
    **{"attention.head_count": 4, "attention.head_count_kv": 1, "attention.kv_lora_rank": 512},
    **{"attention.key_length": 576, "attention.value_length": 512},
    **{"attention.key_length_mla": 192, "attention.value_length_mla": 128},
}
FAMILIES: list[tuple[str, str, int, int, dict[str, Any]]] = [
    ("qwen3_moe", "qwen3moe", 3, 3, PLAIN),
    ("qwen2_moe", "qwen2moe", 3, 2, {"attention.head_count": 4, "attention.head_count_kv": 4}),
    ("mixtral", "llama", 3, 2, PLAIN),
    ("olmoe", "olmoe", 3, 4, PLAIN),
    ("phimoe", "phimoe", 2, 2, PLAIN),
    ("deepseek_v2", "deepseek2", 3, 3, OLD_LATENT),
    ("deepseek_v3", "deepseek2", 3, 3, LATENT),
    ("glm4_moe", "glm4moe", 3, 3, PLAIN),
    ("minimax_m2", "minimax-m2", 3, 3, PLAIN),
    ("qwen3_next", "qwen3next", 4, 3, PLAIN),
    ("gpt_oss", "gpt-oss", 3, 3, {**PLAIN, "attention.sliding_window": 16}),
]
CHANGES: dict[str, dict[str, Any]] = {"qwen3_moe": {"mlp_only_layers": []}}
"""GGUF has no dense layers in this architecture."""


@pytest.mark.parametrize(
    ("family", "architecture", "layers", "chosen", "fields"),
    FAMILIES,
    ids=[family[0] for family in FAMILIES],
)
def test_a_gguf_file_has_the_shape_of_its_config(
    family: str,
    architecture: str,
    layers: int,
    chosen: int,
    fields: dict[str, Any],
    tmp_path: Path,
) -> None:
    folder = make(family, tmp_path / "model", **CHANGES.get(family, {}))
    given = {"block_count": layers, "context_length": 256, "expert_used_count": chosen, **fields}
    file = of_checkpoint(folder, tmp_path / "model.gguf", architecture, given)
    wanted, found = shape.of_folder(folder, "x"), gguf_shape.of_file(file, "x")
    # transformers calls this a buffer, so the shape of config.json does not count it.
    biases = {
        layer_number(name): tensor.shape[0]
        for name, tensor in Checkpoint.open(folder).tensors.items()
        if name.endswith("e_score_correction_bias")
    }
    assert found.layers == tuple(
        replace(layer, others=layer.others + biases.get(layer.number, 0)) for layer in wanted.layers
    )
    for name in ("name", "hidden", "embedding", "head", "tied", "context", "rows"):
        assert getattr(found, name) == getattr(wanted, name), name
    assert found.active == wanted.active + sum(biases.values())
    assert found.cache_bytes(100) == wanted.cache_bytes(100)
    assert [found.cards(most) for most in range(1, 9)] == [wanted.cards(n) for n in range(1, 9)]
    # The bytes are those of the safetensors files, in which all is 16 bits.
    assert found.bits.experts == wanted.bits.experts == 16
    assert found.others * found.bits.others == wanted.others * wanted.bits.others


def test_the_written_sizes(tmp_path: Path) -> None:
    model = gguf_shape.of_file(small(tmp_path / "x.gguf", architecture="dbrx"), "x")
    dense, sparse = model.layers
    attention = 2 * 512 * 512 + 2 * 128 * 512
    assert (dense.experts, dense.others) == (0, attention + 1024 * 512)
    assert (sparse.experts, sparse.chosen, sparse.expert) == (8, 2, 3 * 256 * 512)
    assert sparse.others == attention + 8 * 512
    assert (sparse.cached, sparse.attended, sparse.window) == (256, 8 * 128, UNLIMITED)
    assert (model.hidden, model.embedding, model.head) == (512, 512000, 512000)
    assert model.tied
    router, norm = 8 * 512, 512
    eights = model.others - router
    assert model.others * model.bits.others == pytest.approx(8.5 * eights + 16 * (router + norm))


@pytest.mark.parametrize("name", TYPES)
def test_experts_that_are_served_are_planned_as_the_engine_holds_them(
    name: str, tmp_path: Path
) -> None:
    kind = Type[name]
    held = TYPES[name]
    model = gguf_shape.of_file(small(tmp_path / "x.gguf", kind), "x")
    block, nbytes = GGML_QUANT_SIZES[kind]
    stored = 16 if kind == Type.F32 else 8 * nbytes / block
    assert model.stored == Stored((name,), stored, "qwen3moe")
    format = held.format or "bf16"
    (part,) = model.bits.parts
    assert part == FormatShare(format, 1, stored)
    assert (model.bits.format, model.bits.experts) == (format, pytest.approx(stored))
    assert model.others * model.bits.others == pytest.approx(16 * (model.others + 512))
    # What a layer of the engine really takes.
    if held.split is not None:
        codes, scale = held.split(torch.randint(0, 256, (3, 4, nbytes), dtype=torch.uint8))
        assert part.bits * 3 * 4 * block == 8 * (codes.nbytes + scale.nbytes)


@pytest.mark.parametrize(
    ("kind", "format", "bits", "stored"),
    [
        (Type.Q4_K, "int4", 4.5, 4.5),
        (Type.TQ1_0, "int4", 4.5, 1.6875),
        (Type.Q4_1, "int4", 5, 5),
        (Type.IQ4_XS, "int4", 4.5, 4.25),
        (Type.Q2_K, "int4", 4.5, 2.625),
        (Type.Q5_0, "int8", 8, 5.5),
        (Type.Q6_K, "int8", 8, 6.5625),
        (Type.Q8_0, "int8", 8.5, 8.5),
        (Type.MXFP4, "mxfp4", 4.25, 4.25),
        (Type.F16, "fp16", 16, 16),
        (Type.F32, "bf16", 16, 16),
    ],
)
def test_the_nearest_format_of_a_model_that_is_not_served(
    kind: Type, format: str, bits: float, stored: float, tmp_path: Path
) -> None:
    file = small(tmp_path / "x.gguf", kind, architecture="dbrx")
    model = gguf_shape.of_file(file, "x")
    assert (model.bits.format, model.bits.experts) == (format, bits)
    assert model.stored == Stored((kind.name,), stored, "dbrx")
    assert unserved(model) is not None


TENSORS = {
    "token_embd.weight": ((100, 256), Type.F16),
    "output.weight": ((100, 256), Type.Q6_K),
    "blk.0.attn_k.weight": ((64, 256), Type.F16),
    "blk.0.attn_v.weight": ((64, 256), Type.F16),
    "blk.0.ffn_gate_exps.weight": ((4, 256, 256), Type.Q4_K),
    "blk.0.ffn_up_exps.weight": ((4, 256, 256), Type.Q4_K),
    "blk.0.ffn_down_exps.weight": ((4, 256, 256), Type.Q6_K),
}
FIELDS: dict[str, Any] = {
    "block_count": 1,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "expert_used_count": 2,
}


def test_most_weights_decide_about_the_format(tmp_path: Path) -> None:
    model = gguf_shape.of_file(write(tmp_path / "x.gguf", "llama", FIELDS, TENSORS), "x")
    bits = (4.5 + 4.5 + 6.5625) / 3
    assert model.stored == Stored(("Q4_K", "Q6_K"), bits, "llama")
    assert (model.bits.format, model.bits.experts) == ("q4_k", pytest.approx(bits))
    assert model.bits.parts == (FormatShare("q4_k", 2 / 3, 4.5), FormatShare("q6_k", 1 / 3, 6.5625))
    assert not model.tied
    assert model.context == 4096


def test_experts_of_old_files_and_in_one_tensor(tmp_path: Path) -> None:
    rest = {name: tensor for name, tensor in TENSORS.items() if "exps" not in name}
    parts = ("gate", "up", "down")
    old = rest | {
        f"blk.0.ffn_{part}.{i}.weight": ((256, 256), Type.Q4_K) for part in parts for i in range(4)
    }
    fused = rest | {
        "blk.0.ffn_gate_up_exps.weight": ((4, 512, 256), Type.Q4_K),
        "blk.0.ffn_down_exps.weight": ((4, 256, 256), Type.Q4_K),
    }
    usual = gguf_shape.of_file(write(tmp_path / "x.gguf", "llama", FIELDS, TENSORS), "x").layers
    for name, tensors in (("old", old), ("fused", fused)):
        file = write(tmp_path / f"{name}.gguf", "llama", FIELDS, tensors)
        assert gguf_shape.of_file(file, "x").layers == usual


def test_drafts_are_left_out(tmp_path: Path) -> None:
    more = TENSORS | {
        "blk.1.ffn_up_exps.weight": ((4, 256, 256), Type.Q4_K),
        "blk.1.nextn.eh_proj.weight": ((256, 512), Type.Q4_K),
    }
    drafts = FIELDS | {"block_count": 2, "nextn_predict_layers": 1}
    found = gguf_shape.of_file(write(tmp_path / "x.gguf", "glm4moe", drafts, more), "x")
    plain = gguf_shape.of_file(write(tmp_path / "y.gguf", "glm4moe", FIELDS, TENSORS), "x")
    assert found == plain


@pytest.mark.parametrize(
    ("pattern", "sliding"),
    [([1, 0, 1], [0, 2]), ([1, 1, 0, 1], [0, 1]), ([0, 1], [1]), (3, [0, 1]), (0, [0, 1, 2])],
)
def test_windows_by_layer(pattern: Any, sliding: list[int], tmp_path: Path) -> None:
    fields = FIELDS | {
        "block_count": 3,
        "attention.head_count": [4, 8, 4],
        "attention.head_count_kv": [2, 4, 2],
        "attention.sliding_window": 128,
        "attention.sliding_window_pattern": pattern,
    }
    tensors = TENSORS | {
        name.replace("blk.0", f"blk.{i}"): tensor
        for name, tensor in TENSORS.items()
        for i in range(3)
    }
    model = gguf_shape.of_file(write(tmp_path / "x.gguf", "gemma4", fields, tensors), "x")
    assert [layer.number for layer in model.layers if layer.window == 128] == sliding
    assert {layer.window for layer in model.layers} <= {128, UNLIMITED}
    assert [layer.attended for layer in model.layers] == [4 * 64, 8 * 32, 4 * 64]


def test_keys_and_values_in_one_matrix(tmp_path: Path) -> None:
    tensors = {name: x for name, x in TENSORS.items() if "attn" not in name}
    tensors["blk.0.attn_qkv.weight"] = ((768, 256), Type.F16)
    fields = FIELDS | {"embedding_length": 256}
    model = gguf_shape.of_file(write(tmp_path / "x.gguf", "dbrx", fields, tensors), "x")
    assert (model.layers[0].cached, model.layers[0].attended) == (2 * 2 * 64, 4 * 2 * 64)


@pytest.mark.parametrize(
    ("fields", "tensors", "said"),
    [
        ({"block_count": None}, {}, "x: has no field 'llama.block_count'"),
        ({"expert_used_count": None}, {}, "x: has no field 'llama.expert_used_count'"),
        ({"expert_used_count": 0}, {}, "x: field 'llama.expert_used_count' is 0, at least 1"),
        ({"expert_used_count": 5}, {}, "x: field 'llama.expert_used_count' is 5, layer 0 has 4"),
        ({"attention.head_count": None}, {}, "x: has no field 'llama.attention.head_count'"),
        ({"attention.head_count": "4"}, {}, "x: field 'llama.attention.head_count' is '4', a n"),
        ({"attention.head_count": [4.5]}, {}, "x: field 'llama.attention.head_count' is 4.5, a n"),
        ({"block_count": 1 << 31}, {}, "x: has no tensors of layer 1, and 2147483648 layers are"),
        ({}, {"token_embd.weight": None}, "x: has no tensor 'token_embd.weight'"),
        ({}, {"blk.0.attn_k.weight": ((64,), Type.F32)}, "x: tensor 'blk.0.attn_k.weight' has th"),
        (
            {},
            {f"blk.0.ffn_{part}_exps.weight": None for part in ("gate", "up", "down")},
            "x: the model has no routed experts, for which LvLLM is made",
        ),
        ({}, dict.fromkeys(name for name in TENSORS if "blk" in name), "x: has no tensors of lay"),
    ],
)
def test_what_cannot_be_planned_is_said_in_one_line(
    fields: dict[str, Any], tensors: dict[str, Any], said: str, tmp_path: Path
) -> None:
    given = {name: value for name, value in (FIELDS | fields).items() if value is not None}
    there: dict[str, Any] = {k: v for k, v in (TENSORS | tensors).items() if v is not None}
    file = write(tmp_path / "x.gguf", "llama", given, there)
    with pytest.raises(PlanError) as error:
        gguf_shape.of_file(file, "x")
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)
