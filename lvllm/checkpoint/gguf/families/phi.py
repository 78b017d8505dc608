"""Phi-3.5-MoE and Phi-mini-MoE, whose norms, attention and head have biases."""

import struct
from typing import Any

from lvllm.checkpoint.files import OpenFile
from lvllm.checkpoint.gguf.architecture import Architecture
from lvllm.checkpoint.gguf.families.common import ATTENTION, NORMS, basics, experts, heads
from lvllm.checkpoint.gguf.families.mixtral import ROUTED
from lvllm.checkpoint.gguf.fields import Fields
from lvllm.checkpoint.headers import CheckpointError
from lvllm.errors import quoted

__all__ = ["PHI"]

FACTORS = {"long_factor": "rope_factors_long.weight", "short_factor": "rope_factors_short.weight"}
"""LongRoPE's factors of the wavelengths, which the file has as tensors."""
MSCALE = 1.243163121016122
"""What LongRoPE multiplies sines and cosines with. The file has another value, which llama.cpp
takes; in the model's config.json, this is that of short and of long contexts."""


def _config(fields: Fields) -> dict[str, Any]:
    tensors, of_heads = fields.header.tensors, heads(fields)
    return {
        **basics(fields),
        **of_heads,
        **experts(fields, "num_local_experts"),
        "intermediate_size": fields.whole("feed_forward_length", 1, 1 << 20),
        "sliding_window": fields.whole("attention.sliding_window", 0, 1 << 30, 0) or None,
        "attention_bias": any(name.endswith(".attn_q.bias") for name in tensors),
        "lm_head_bias": "output.bias" in tensors,
        **_longrope(fields, of_heads["head_dim"] // 2),
    }


def _longrope(fields: Fields, count: int) -> dict[str, Any]:
    there = [name for name in FACTORS.values() if name in fields.header.tensors]
    if not there:
        return {}
    return {
        "rope_scaling": {
            "rope_type": "longrope",
            **{key: _factors(fields, name, count) for key, name in FACTORS.items()},
            "short_mscale": MSCALE,
            "long_mscale": MSCALE,
            "original_max_position_embeddings": fields.whole(
                "rope.scaling.original_context_length", 1, 1 << 30
            ),
        }
    }


def _factors(fields: Fields, name: str, count: int) -> list[float]:
    """The values of a tensor, which are to be `count` numbers greater than 0."""
    tensor = fields.header.tensors.get(name)
    if tensor is None:
        raise CheckpointError(f"{fields.header.file}: has no tensor {quoted(name)}")
    if tensor.type != "F32" or tensor.shape != (count,):
        raise tensor.refuse(f"is {tensor.type} {list(tensor.shape)}, wanted is F32 [{count}]")
    data = bytearray(tensor.nbytes)
    try:
        OpenFile(tensor.file).fill(memoryview(data), tensor.start)
    except EOFError:
        raise tensor.refuse("truncated") from None
    except OSError as error:
        raise tensor.refuse(error.strerror or str(error)) from None
    found = struct.unpack(f"<{count}f", data)
    if not all(0 < one < float("inf") for one in found):
        raise tensor.refuse("numbers greater than 0 are wanted")
    return list(found)


PHI = Architecture(
    "PhiMoEForCausalLM",
    "phimoe",
    _config,
    {**NORMS, **ATTENTION, **ROUTED},
    unused=tuple(FACTORS.values()),
)
