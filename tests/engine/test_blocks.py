"""`ExpertLayer` on blocks of GGUF, against the values that the `gguf` package reads."""

import random
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize

from benchmarks.weights import random_blocks
from lvllm.engine import ExpertLayer
from lvllm.engine.weight_formats import BLOCK_FORMATS
from lvllm.verifying.stored import matrix

pytestmark = pytest.mark.usefixtures("default_settings")


def random_matrix(format: str, experts: int, rows: int, columns: int) -> torch.Tensor:
    """Blocks of random bits with small factors: uint8 [experts, rows, bytes]."""
    count = columns // BLOCK_FORMATS[format].block_weights
    return random_blocks(format, experts * rows * count, 0.05).view(experts, rows, -1)


def values(format: str, blocks: torch.Tensor) -> torch.Tensor:
    kind = gguf.GGMLQuantizationType[format.upper()]
    return torch.from_numpy(np.stack([dequantize(expert, kind) for expert in blocks.numpy()]))


def reference(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor
) -> torch.Tensor:
    """The expert block in float32."""
    out = torch.zeros(x.shape)
    for token, (chosen, factors) in enumerate(zip(ids, weights, strict=True)):
        for expert, factor in zip(chosen, factors, strict=True):
            gate, up = (w13[expert] @ x[token].float()).chunk(2)
            out[token] += factor * (w2[expert] @ (torch.nn.functional.silu(gate) * up))
    return out


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(
    ("w13_format", "w3_format", "w2_format"),
    [
        *((name, None, name) for name in BLOCK_FORMATS),
        ("q4_k", None, "q6_k"),
        ("q3_k", None, "bf16"),
        ("q5_1", None, "iq4_nl"),
        ("iq2_xxs", None, "iq3_s"),
        ("iq1_m", None, "q4_k"),
        ("q4_k", "q6_k", "q4_k"),
        ("q5_0", "iq4_nl", "q4_1"),
        ("iq2_s", "q3_k", "bf16"),
    ],
)
def test_accuracy(w13_format: str, w3_format: str | None, w2_format: str, bits: int) -> None:
    hidden, intermediate, experts = 512, 768, 4
    if BLOCK_FORMATS[w13_format].block_weights == 32:
        hidden, intermediate = random.choice([(480, 672), (96, 800), (544, 96)])
    own_up: dict[str, Any] = {}
    if w3_format is None:
        w13 = random_matrix(w13_format, experts, 2 * intermediate, hidden)
        w13_values = values(w13_format, w13)
    else:
        w13 = random_matrix(w13_format, experts, intermediate, hidden)
        w3 = random_matrix(w3_format, experts, intermediate, hidden)
        w13_values = torch.cat((values(w13_format, w13), values(w3_format, w3)), dim=1)
        own_up = {"w3": w3, "w3_format": w3_format, "w3_activation_bits": bits}
    if w2_format == "bf16":
        w2 = (torch.randn(experts, hidden, intermediate) / 30).bfloat16()
        w2_values = w2.float()
    else:
        w2 = random_matrix(w2_format, experts, hidden, intermediate)
        w2_values = values(w2_format, w2)
    came = {name: tensor.clone() for name, tensor in (("w13", w13), ("w2", w2))}
    if w3_format is not None:
        came["w3"] = w3.clone()
    layer = ExpertLayer(
        **own_up,
        format=w13_format,
        w2_format=w2_format,
        w13=w13,
        w2=w2,
        activation_bits=bits,
        w2_activation_bits=16 if w2_format == "bf16" else bits,
    )
    for name, stored in (("w13", w13_values), ("w2", w2_values)):
        assert torch.equal(matrix(layer, name, 1), stored[1])
    for tokens in (1, 5, 60):
        # The sums of the first projection are about 1, where silu is not linear.
        scale = w13_values.square().mean().sqrt() * hidden**0.5
        x = (torch.randn(tokens, hidden) / scale).bfloat16()
        ids = torch.stack([torch.randperm(experts)[:2] for _ in range(tokens)]).int()
        weights = torch.rand(tokens, 2)
        want = reference(x, ids, weights, w13_values, w2_values)
        got = layer(x, ids, weights).float()
        error = (got - want).norm() / want.norm()
        # Scales of random bits differ more than those of a model, and so do 8-bit errors: 1.5e-2 is
        # the bound for models.
        assert error < (2.5e-2 if bits == 8 else 3e-3), f"{tokens} tokens: {error}"
    tensors = layer.tensors
    layer.release()
    for name, tensor in came.items():
        assert torch.equal(tensors[name], tensor)


def test_refused_shapes() -> None:
    def blocks(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.uint8)

    with pytest.raises(ValueError, match="w13 has rows of 200 bytes, wanted whole blocks of 144"):
        ExpertLayer(format="q4_k", w13=blocks(1, 512, 200), w2=blocks(1, 256, 144))
    with pytest.raises(ValueError, match="w13 has 100 rows an expert, wanted a multiple of 512"):
        ExpertLayer(format="q4_k", w13=blocks(1, 100, 144), w2=blocks(1, 256, 144))
    with pytest.raises(ValueError, match=r"w2 has shape \(1, 256, 144\), w13 of"):
        ExpertLayer(
            format="q4_k", w2_format="q6_k", w13=blocks(1, 512, 144), w2=blocks(1, 256, 144)
        )
    with pytest.raises(ValueError, match="w13_scale was given, but format q4_k has none"):
        ExpertLayer(
            format="q4_k",
            w13=blocks(1, 512, 144),
            w2=blocks(1, 256, 144),
            w13_scale=torch.ones(1, 512, 1),
        )


def test_refused_up_rows() -> None:
    """What a layer may not have whose up rows are in w3."""
    blocks = {"w13": (1, 256, 144), "w2": (1, 256, 144), "w3": (1, 256, 210)}
    tensors = {name: torch.zeros(shape, dtype=torch.uint8) for name, shape in blocks.items()}
    given: dict[str, Any] = {"format": "q4_k", "w3_format": "q6_k", **tensors}
    ExpertLayer(**given)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"w3_format": None}, "w3 was given, but w3_format was not"),
        ({"w3": None}, "w3_format was given, but w3 was not"),
        ({"w3_format": "nvfp4"}, "w3_format is 'nvfp4', must be one of bf16, .*, iq3_s"),
        ({"w3_format": "q5_k"}, r"w3 has shape \(1, 256, 210\), wanted \(1, 256, 176\)"),
        ({"w3_scale": torch.ones(1, 256, 8)}, "w3_scale was given, but format q6_k has none"),
        ({"w3_format": "int4", "w3": torch.zeros(1, 256, 128).byte()}, "w3_scale is missing"),
        ({"w13_bias": torch.ones(1, 256)}, "w3 was given, and so was w13_bias"),
        ({"interleaved": True}, "w3 was given, but interleaved is True"),
        ({"activation": "relu2"}, "w3 was given, but activation relu2 has no gate"),
        ({"w13": torch.zeros(1, 512, 144).byte()}, r"w2 has shape \(1, 256, 144\), w13 of"),
    ]
    for change, message in changes:
        with pytest.raises(ValueError, match=message):
            ExpertLayer(**(given | change))
    whole = {name: given[name] for name in ("format", "w13", "w2")}
    with pytest.raises(ValueError, match="w3_scale was given, but w3 was not"):
        ExpertLayer(**whole | {"w13": torch.zeros(1, 512, 144).byte(), "w3_scale": torch.ones(1)})
