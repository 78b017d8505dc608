"""GGUF files that have a header and no data, written with the gguf package's names and types."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from lvllm.checkpoint.headers import Checkpoint
from tests.models.gguf import add_fields

__all__ = ["Tensors", "of_checkpoint", "small", "write"]

Tensors = Mapping[str, tuple[tuple[int, ...], Type]]
"""The shape, with the outputs before the inputs, and the type of each tensor."""


def write(
    path: Path, architecture: str, fields: Mapping[str, Any], tensors: Tensors, **split: int
) -> Path:
    """A file with `fields`, whose names are without the architecture.

    `split` has the fields of a part: no, count and tensors_count.
    """
    file = gguf.GGUFWriter(path, architecture)
    add_fields(file, architecture, fields)
    for name, value in split.items():
        file.add_uint32(f"split.{name.replace('_', '.')}", value)
    for name, (shape, kind) in tensors.items():
        nbytes = int(np.prod(gguf.quant_shape_to_byte_shape(shape, kind)))
        # The package takes any type but bytes for the shape of the weights.
        file.add_tensor_info(name, shape, np.dtype(np.float16), nbytes, raw_dtype=kind)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_ti_data_to_file()
    file.close()
    return path


def small(
    path: Path, expert: Type = Type.Q4_K, architecture: str = "qwen3moe", **fields: Any
) -> Path:
    """A model of two layers, the second of which has 8 experts of 3 * 256 * 512 weights.

    A field of None is left out.
    """
    common = {
        "block_count": 2,
        "context_length": 4096,
        "embedding_length": 512,
        "attention.head_count": 8,
        "attention.head_count_kv": 2,
        "expert_count": 8,
        "expert_used_count": 2,
    }
    tensors: dict[str, tuple[tuple[int, ...], Type]] = {
        "token_embd.weight": ((1000, 512), Type.Q8_0),
        "output_norm.weight": ((512,), Type.F32),
    }
    for block in ("blk.0", "blk.1"):
        tensors |= {
            f"{block}.attn_q.weight": ((512, 512), Type.Q8_0),
            f"{block}.attn_k.weight": ((128, 512), Type.Q8_0),
            f"{block}.attn_v.weight": ((128, 512), Type.Q8_0),
            f"{block}.attn_output.weight": ((512, 512), Type.Q8_0),
        }
    tensors |= {"blk.0.ffn_up.weight": ((1024, 512), Type.Q8_0)}
    tensors |= {
        "blk.1.ffn_gate_inp.weight": ((8, 512), Type.F32),
        "blk.1.ffn_gate_exps.weight": ((8, 256, 512), expert),
        "blk.1.ffn_up_exps.weight": ((8, 256, 512), expert),
        "blk.1.ffn_down_exps.weight": ((8, 512, 256), expert),
    }
    given = {name: value for name, value in (common | fields).items() if value is not None}
    return write(path, architecture, given, tensors)


def of_checkpoint(folder: Path, path: Path, architecture: str, fields: Mapping[str, Any]) -> Path:
    """The header of a GGUF file of the model whose safetensors are in a folder, in 16 bits.

    The tensors are named by the gguf package's table, as tools that convert models name them.
    """
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, 99)
    tensors: dict[str, tuple[tuple[int, ...], Type]] = {}
    counts: dict[str, int] = {}
    for name, tensor in Checkpoint.open(folder).tensors.items():
        for part, shape in _split(name, tensor.shape, split_latent="key_length_mla" in str(fields)):
            stacked = re.sub(r"experts\.\d+\.", "experts.", part)
            called = names.get_name(stacked, (".weight", ".bias"))
            assert called is not None, part
            if not called.endswith((".weight", ".bias")) and ".ssm_a" not in called:
                called += ".weight"
            if stacked != part:
                counts[called] = counts.get(called, 0) + 1
                shape = (counts[called], *shape)
            tensors[called] = shape, Type.F32 if len(shape) == 1 else Type.BF16
    return write(path, architecture, fields, tensors)


def _split(
    name: str, shape: tuple[int, ...], split_latent: bool
) -> list[tuple[str, tuple[int, ...]]]:
    """The tensors that become of one, with names that the table knows."""
    name = re.sub(r"(dt|e_score_correction)_bias$", r"\1.bias", name).replace(".dt.", ".dt_proj.")
    if "experts" in name and (found := re.match(r"(.*\.)(gate_up|down)_proj(_bias)?$", name)):
        suffix = ".bias" if found[3] else ".weight"
        shape = shape if found[3] else (shape[0], shape[2], shape[1])
        if found[2] == "down":
            return [(f"{found[1]}down_proj{suffix}", shape)]
        half = (shape[0], shape[1] // 2, *shape[2:])
        return [(f"{found[1]}{part}_proj{suffix}", half) for part in ("gate", "up")]
    if split_latent and name.endswith("kv_b_proj.weight"):
        heads, key, value, rank = 4, 128, 128, shape[1]
        assert shape[0] == heads * (key + value)
        start = name.removesuffix("kv_b_proj.weight")
        return [
            (f"{start}k_b_proj.weight", (heads, rank, key)),
            (f"{start}v_b_proj.weight", (heads, value, rank)),
        ]
    return [(name, shape)]
