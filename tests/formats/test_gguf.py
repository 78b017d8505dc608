"""Experts in ggml's blocks, as lk's arguments, compared with the values of the gguf package."""

import random
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from torch.nn import Module

from lvllm.checkpoint.headers import CheckpointError, TensorInfo
from lvllm.engine import ExpertLayer
from lvllm.engine.dequantize import values
from lvllm.formats.base import Shape
from lvllm.formats.gguf import DESCRIPTOR, TYPES, Gguf, Held, check_types
from tests.models.gguf import quantise

EXPERTS, HIDDEN, SIZE = 3, 512, 512
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SHARDS = {"w1": (SIZE, HIDDEN), "w3": (SIZE, HIDDEN), "w2": (HIDDEN, SIZE)}
RAW = TYPES["Q4_K"]
"""A type whose blocks lk would take as they are."""

Stored = dict[tuple[int, str], torch.Tensor]


def allocate(size: Any, dtype: torch.dtype, *, parts: int) -> torch.Tensor:
    return torch.zeros(size, dtype=dtype)


class Layer(Module):
    """As much of vLLM's layer as a format looks at."""

    layer_name = "model.layers.0.mlp.experts"

    def __init__(self, rank: int, ranks: int) -> None:
        super().__init__()
        parallel = SimpleNamespace(tp_size=ranks)
        self.moe_config = SimpleNamespace(tp_rank=rank, moe_parallel_config=parallel)


def loaded(
    held: Held, stored: Stored, rank: int, ranks: int, *, up: Held | None = None
) -> dict[str, Any]:
    """lk's arguments for one rank, once all tensors have come. `up` has another type, if given."""
    layer, format = Layer(rank, ranks), Gguf(held, up or held, held)
    shape = Shape(EXPERTS, HIDDEN, SIZE // ranks, 2, allocate)
    format.create_weights(layer, shape, torch.bfloat16, {})
    for (expert, shard), tensor in stored.items():
        parameter: Any = layer.get_parameter("w2_weight" if shard == "w2" else "w13_weight")
        parameter.place(parameter.data, expert, tensor, shard)
    return format.tensors(layer)


def draw(kind: Type, up: Type | None = None) -> tuple[Stored, Stored]:
    """Random tensors of all experts as the file has them, and their values in float32.

    Those of up have another type, if one is given.
    """
    draw = np.random.default_rng(random.getrandbits(32))
    stored, wanted = {}, {}
    for expert in range(EXPERTS):
        for shard, size in SHARDS.items():
            own = up if up is not None and shard == "w3" else kind
            numbers = draw.normal(0, 1, size).astype(np.float32)
            raw = quantise(numbers, own)
            tensor = torch.from_numpy(raw)
            if own.name in FLOATS:
                tensor = tensor.view(torch.uint8).view(FLOATS[own.name])
            stored[expert, shard] = tensor
            wanted[expert, shard] = torch.from_numpy(gguf.dequantize(raw, own))
    return stored, wanted


def of_rank(whole: Stored, rank: int, ranks: int) -> dict[tuple[str, int], torch.Tensor]:
    """A rank's rows of gate and up, and its columns of down."""
    found = {}
    for expert in range(EXPERTS):
        gate, up = (whole[expert, shard].chunk(ranks, 0)[rank] for shard in ("w1", "w3"))
        found["w13", expert] = torch.cat((gate, up))
        found["w2", expert] = whole[expert, "w2"].chunk(ranks, 1)[rank]
    return found


@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize("name", list(TYPES))
def test_every_type_has_the_values_of_the_file(name: str, rank: int, ranks: int) -> None:
    stored, whole = draw(Type[name])
    tensors = loaded(TYPES[name], stored, rank, ranks)
    for (matrix, expert), wanted in of_rank(whole, rank, ranks).items():
        if name == "F32":
            wanted = wanted.bfloat16().float()
        assert torch.equal(values(tensors, matrix, expert), wanted)


@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (1, 2)])
@pytest.mark.parametrize(
    ("gate", "up"), [("Q4_K", "Q6_K"), ("Q8_0", "IQ2_XS"), ("IQ3_S", "Q4_0"), ("BF16", "MXFP4")]
)
def test_gate_and_up_may_have_two_types(gate: str, up: str, rank: int, ranks: int) -> None:
    stored, whole = draw(Type[gate], Type[up])
    tensors = loaded(TYPES[gate], stored, rank, ranks, up=TYPES[up])
    for (matrix, expert), wanted in of_rank(whole, rank, ranks).items():
        assert torch.equal(values(tensors, matrix, expert), wanted)
    layer = ExpertLayer(**tensors)
    assert (layer.format, layer.w3_format) == (TYPES[gate].format, TYPES[up].format)
    stored[1, "w3"] = stored[1, "w3"][:, :-1]
    with pytest.raises(ValueError, match=r"has \[512, \d+\] where the model takes \[512, \d+\]$"):
        loaded(TYPES[gate], stored, rank, ranks, up=TYPES[up])


def test_what_does_not_fit() -> None:
    stored, _ = draw(Type.Q8_0)
    short = stored | {(1, "w3"): stored[1, "w3"][:-1]}
    with pytest.raises(ValueError, match=r"has \[511, 544\] where the model takes \[512, 544\]$"):
        loaded(TYPES["Q8_0"], short, 0, 1)
    with pytest.raises(ValueError, match=r"w2 has 128 columns in this process, and blocks of 256$"):
        loaded(RAW, {}, 0, 4)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "MXFP4", "Q4_K", "IQ1_M", "IQ3_S"])
def test_scales_that_are_no_numbers(name: str) -> None:
    stored, _ = draw(Type[name])
    row = stored[2, "w2"][7]
    if name == "IQ1_M":  # in the high halves of four bytes
        row[49:56:2] |= 0xF0
    else:  # the bytes of NaN in float16, and in the exponents of MXFP4
        row[:2] = torch.tensor([255, 255 if name == "MXFP4" else 127])
    with pytest.raises(ValueError, match=r"^1 of its scales are NaN or infinite$"):
        loaded(TYPES[name], stored, 0, 1)


def test_types_that_lk_does_not_compute() -> None:
    def check(*types: str, model: str = "qwen3_moe") -> None:
        section = {"experts": {"0": ["Q8_0"] * 3, "4": list(types)}}
        check_types({"model_type": model, "quantization_config": section}, "x.gguf")

    for name in TYPES:
        check(name, name, name)
    with pytest.raises(CheckpointError, match=r"^x.gguf: tensor 'blk.4.ffn_up_exps.weight': expe"):
        check("Q8_0", "TQ1_0", "Q8_0")
    with pytest.raises(CheckpointError, match=r"^x.gguf: tensor 'blk.4.ffn_up_exps.weight': is "):
        check("Q8_0", "Q4_0", "Q8_0", model="gpt_oss")
    check("Q4_K", "Q5_K", "Q6_K")


@pytest.mark.parametrize("name", list(TYPES))
def test_weights_are_counted(name: str, tmp_path: Any) -> None:
    section = {"quant_method": "gguf", "experts": {"0": ["Q2_K", name, "Q2_K"]}}
    block, nbytes = gguf.GGML_QUANT_SIZES[Type[name]]
    assert (TYPES[name].weights, TYPES[name].nbytes) == (block, nbytes)
    module = "model.layers.0.mlp.experts.5.up_proj"
    size = 96 * 64 // block * nbytes
    dtype = FLOATS.get(name, torch.uint8)
    tensor = TensorInfo(f"{module}.weight", tmp_path, dtype, (), 0, size)
    assert DESCRIPTOR.holds_weights(tensor.name)
    assert DESCRIPTOR.weights_in(tensor, DESCRIPTOR.of_module(section, module)) == 96 * 64
    for other in ("model.layers.1.mlp.experts.5.down_proj", "model.layers.0.self_attn.q_proj"):
        assert DESCRIPTOR.of_module(section, other).bits == 16
