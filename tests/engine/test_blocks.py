"""`ExpertLayer` on blocks of GGUF, against the values that the `gguf` package reads."""

import random

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
    ("w13_format", "w2_format"),
    [
        *((name, name) for name in BLOCK_FORMATS),
        ("q4_k", "q6_k"),
        ("q3_k", "bf16"),
        ("q5_1", "iq4_nl"),
        ("iq2_xxs", "iq3_s"),
        ("iq1_m", "q4_k"),
    ],
)
def test_accuracy(w13_format: str, w2_format: str, bits: int) -> None:
    hidden, intermediate, experts = 512, 768, 4
    if BLOCK_FORMATS[w13_format].block_weights == 32:
        hidden, intermediate = random.choice([(480, 672), (96, 800), (544, 96)])
    w13 = random_matrix(w13_format, experts, 2 * intermediate, hidden)
    w13_values = values(w13_format, w13)
    if w2_format == "bf16":
        w2 = (torch.randn(experts, hidden, intermediate) / 30).bfloat16()
        w2_values = w2.float()
    else:
        w2 = random_matrix(w2_format, experts, hidden, intermediate)
        w2_values = values(w2_format, w2)
    came = w13.clone(), w2.clone()
    layer = ExpertLayer(
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
    layer.release()
    assert torch.equal(w13, came[0])
    assert torch.equal(w2, came[1])


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
