"""Writes a checkpoint of safetensors as a GGUF file, as tools that convert models do.

python -m tests.models.gguf examples/models/tiny-moe OUT.gguf --experts Q8_0
"""

import argparse
import json
import random
import re
import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file

from benchmarks.weights import random_blocks
from lvllm.engine.weight_formats import BLOCK_FORMATS
from tests.models.gguf_families import FAMILIES, Family, plain

__all__ = ["add_fields", "dequantised", "large", "quantise", "write"]

_EXPERT = re.compile(r"experts\.(\d+)\.")

Choice = Callable[[str], Type]
"""The type of a tensor, by its name in the GGUF file."""
Tensors = dict[str, tuple[np.ndarray, Type]]
"""Values in float32 [outputs, inputs], and the type to store them in, by ggml's names."""


def write(folder: Path, path: Path, kind: Choice, parts: int = 1, **fields: Any) -> Path:
    """Write the model in `folder` to the file `path`, or to several files; return the first.

    A field of None is left out.
    """
    config = _config(folder)
    family = FAMILIES[config["model_type"]]
    stored = _tensors(folder, config, family, kind)
    names = list(stored)
    first = path
    for number in range(parts):
        if parts > 1:
            path = path.with_name(f"{path.stem}-{number + 1:05}-of-{parts:05}.gguf")
            first = path if number == 0 else first
        file = gguf.GGUFWriter(path, family.name)
        if number == 0:
            add_fields(file, family.name, family.fields(config) | fields)
            if (folder / "tokenizer.json").is_file():
                _add_tokenizer(file, folder, config)
        if parts > 1:
            file.add_uint16("split.no", number)
            file.add_uint16("split.count", parts)
            file.add_int32("split.tensors.count", len(names))
        for name in names[number::parts]:
            values, of = stored[name]
            file.add_tensor(name, quantise(values, of), raw_dtype=of)
        file.write_header_to_file()
        file.write_kv_data_to_file()
        file.write_tensors_to_file()
        file.close()
        path = first.with_name(re.sub(r"-00001-of-.*", ".gguf", first.name))
    return first


def large(path: Path, layers: int) -> Path:
    """Write a qwen3moe model with experts of 0.6 GiB a layer, all in Q8_0."""
    hidden, size, experts, head, heads, words = 2048, 768, 128, 128, 16, 32768
    config = {
        "num_hidden_layers": layers,
        "max_position_embeddings": 4096,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": 4,
        "head_dim": head,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "num_experts": experts,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": size,
    }
    draw = np.random.default_rng(random.getrandbits(32))
    one = draw.normal(0, 0.02, (1024, 2048)).astype(np.float32)
    blocks = quantise(one, Type.Q8_0).reshape(-1)

    def matrix(*shape: int) -> np.ndarray:
        """Random weights, which repeat themselves."""
        row_bytes = shape[-1] // 32 * 34
        return np.resize(blocks, (*shape[:-1], row_bytes))

    gate, down = matrix(experts, size, hidden), matrix(experts, hidden, size)
    layer = {
        "attn_q": matrix(heads * head, hidden),
        "attn_k": matrix(4 * head, hidden),
        "attn_v": matrix(4 * head, hidden),
        "attn_output": matrix(hidden, heads * head),
        "ffn_gate_inp": matrix(experts, hidden),
        "ffn_gate_exps": gate,
        "ffn_up_exps": gate,
        "ffn_down_exps": down,
    }
    norms = {"attn_norm": hidden, "ffn_norm": hidden, "attn_q_norm": head, "attn_k_norm": head}
    file = gguf.GGUFWriter(path, "qwen3moe")
    add_fields(file, "qwen3moe", plain(config))
    for name in ("token_embd", "output"):
        file.add_tensor(f"{name}.weight", matrix(words, hidden), raw_dtype=Type.Q8_0)
    file.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    for number in range(layers):
        for name, values in layer.items():
            file.add_tensor(f"blk.{number}.{name}.weight", values, raw_dtype=Type.Q8_0)
        for name, count in norms.items():
            file.add_tensor(f"blk.{number}.{name}.weight", np.ones(count, np.float32))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


def quantise(values: np.ndarray, kind: Type) -> np.ndarray:
    """The bytes of a tensor [..., rows, columns] of float32 in a type.

    Only ggml itself quantises to some types. They get random blocks of the same size, which are the
    same for the same matrix.
    """
    format = kind.name.lower()
    if format not in BLOCK_FORMATS or kind in (Type.Q4_1, Type.Q5_0, Type.Q5_1):
        return gguf.quantize(values, kind)
    if values.ndim > 2:
        return np.stack([quantise(matrix, kind) for matrix in values])
    generator = torch.Generator().manual_seed(zlib.crc32(values.tobytes()))
    count = values.size // BLOCK_FORMATS[format].block_weights
    blocks = random_blocks(format, count, float(values.std()), generator)
    return blocks.numpy().reshape(len(values), -1)


def dequantised(folder: Path, out: Path, kind: Choice) -> Path:
    """Write the model in `folder` to `out`, with the values that the GGUF file has."""
    config = _config(folder)
    family = FAMILIES[config["model_type"]]
    out.mkdir(parents=True)
    for file in folder.iterdir():
        if file.suffix == ".json":
            shutil.copy(file, out)
    found: dict[str, torch.Tensor] = {}
    table = _table(family)
    for name, tensor in _load(folder).items():
        values = tensor.float().numpy()
        # Where each value of the file's tensors belongs.
        places = family.split(config, name, np.arange(values.size).reshape(values.shape))
        for part, stored in family.split(config, name, values).items():
            of = kind(_ggml_name(table, part))
            if family.compute is not None and family.compute(part, stored) is not stored:
                assert of == Type.F32
                continue
            held = gguf.dequantize(quantise(np.ascontiguousarray(stored), of), of)
            values.flat[places[part]] = held.reshape(stored.shape)
        found[name] = torch.from_numpy(values)
    save_file(found, out / "model.safetensors")
    return out


def _tensors(folder: Path, config: Mapping[str, Any], family: Family, kind: Choice) -> Tensors:
    table = _table(family)
    found: Tensors = {}
    stacks: dict[str, dict[int, np.ndarray]] = {}
    for whole, tensor in _load(folder).items():
        for name, values in family.split(config, whole, tensor.float().numpy()).items():
            called, expert = _ggml_name(table, name), _EXPERT.search(name)
            values = values if family.compute is None else family.compute(name, values)
            if expert:
                stacks.setdefault(called, {})[int(expert[1])] = values
            else:
                # A matrix of one row is a vector.
                values = values.squeeze(0) if "gate_inp_shexp" in called else values
                found[called] = np.ascontiguousarray(values), kind(called)
    for called, stack in stacks.items():
        found[called] = np.stack([stack[number] for number in sorted(stack)]), kind(called)
    return found | _drafting(config, found) | _factors(config)


def _factors(config: Mapping[str, Any]) -> Tensors:
    """LongRoPE's factors, which only the file has as tensors."""
    return {
        f"rope_factors_{name}.weight": (np.array(config[f"{name}_factor"], np.float32), Type.F32)
        for name in ("long", "short")
        if config.get("rope_type") == "longrope"
    }


def _drafting(config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """Layers that draft tokens, which are like the last one, and one tensor that only they have."""
    found: Tensors = {}
    for number in range(config.get("num_nextn_predict_layers", 0)):
        layers = config["num_hidden_layers"]
        last, name = f"blk.{layers - 1}.", f"blk.{layers + number}."
        found |= {one.replace(last, name): it for one, it in tensors.items() if last in one}
        found[f"{name}nextn.eh_proj.weight"] = np.ones((4, 8), np.float32), Type.F32
    return found


def _table(family: Family) -> gguf.TensorNameMap:
    return gguf.get_tensor_name_map(
        next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.name), 99
    )


def _ggml_name(table: gguf.TensorNameMap, name: str) -> str:
    name = _EXPERT.sub("experts.", name).replace("score_correction_bias", "score_correction.bias")
    called = table.get_name(name, (".weight", ".bias", ".scale"))
    assert called is not None, name
    return called


def add_fields(file: gguf.GGUFWriter, architecture: str, values: Mapping[str, Any]) -> None:
    """Write fields whose names are without the architecture; those of None are left out."""
    for name, value in values.items():
        full = f"{architecture}.{name}"
        if isinstance(value, list):
            file.add_array(full, value)
        elif isinstance(value, bool):
            file.add_bool(full, value)
        elif isinstance(value, float):
            file.add_float32(full, value)
        elif isinstance(value, str):
            file.add_string(full, value)
        elif value is not None:
            file.add_uint32(full, value)


def _add_tokenizer(file: gguf.GGUFWriter, folder: Path, config: Mapping[str, Any]) -> None:
    """Write a tokenizer of byte-level BPE; how it cuts a text, GGUF files can only name."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    told = json.loads((folder / "tokenizer_config.json").read_text())
    added = {one["id"]: one for one in tokenizer["added_tokens"]}
    words = {number: word for word, number in tokenizer["model"]["vocab"].items()}
    words |= {number: one["content"] for number, one in added.items()}
    count = config["vocab_size"]
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("llama-bpe" if tokenizer["model"].get("ignore_merges") else "qwen2")
    file.add_token_list([words.get(number, f"[PAD{number}]") for number in range(count)])
    normal, unused = gguf.TokenType.NORMAL, gguf.TokenType.UNUSED
    kinds = [normal if number in words else unused for number in range(count)]
    for number, one in added.items():
        special = gguf.TokenType.CONTROL if one["special"] else gguf.TokenType.USER_DEFINED
        kinds[number] = special
    file.add_token_types(kinds)
    merges = tokenizer["model"]["merges"]
    file.add_token_merges([x if isinstance(x, str) else " ".join(x) for x in merges])
    file.add_eos_token_id(config["eos_token_id"])
    file.add_pad_token_id(config["pad_token_id"])
    file.add_add_bos_token(False)
    if "chat_template" in told:
        file.add_chat_template(told["chat_template"])


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    # transformers has written the number of experts under both names.
    names = ("num_local_experts", "n_routed_experts", "num_experts")
    count = next((config[name] for name in names if config.get(name) is not None), None)
    return config | config.get("rope_parameters", {}) | {"num_experts": count}


def _load(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def _by_kind(experts: Type, others: Type) -> Choice:
    """Norms and the router stay in float32, as tools that convert models have it."""

    def kind(name: str) -> Type:
        if "norm" in name or "ffn_gate_inp" in name:
            return Type.F32
        return experts if "_exps" in name else others

    return kind


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--experts", default="Q8_0")
    parser.add_argument("--others", default="Q8_0")
    given = parser.parse_args()
    print(write(given.folder, given.file, _by_kind(Type[given.experts], Type[given.others])))
