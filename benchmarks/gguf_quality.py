"""What ggml's types cost the demo model: KL divergence and perplexity in each type of experts.

    python -m benchmarks.gguf_quality [--markdown docs/gguf.md]

ggml itself quantises the experts (llama-cpp-python; see requirements/bench.txt), without an
importance matrix, or with one of ones for the types that it refuses to write without. All other
weights are bfloat16, as in the demo model. The types are those that LvLLM serves, and `lvllm eval`
measures each file.

Blocks of K-quants have 256 weights, and the demo model's rows have 128. So the model is widened
with zeros, to rows of 512 and 256, which computes the same: with four times as many values, their
root mean square is half as large, and the norms' weights make up for that.
"""

from __future__ import annotations

import json
import sys
from ctypes import c_bool, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import gguf
import numpy as np
import torch
import typer
from gguf import GGMLQuantizationType as Type
from rich.console import Console
from safetensors.torch import load_file, save_file

from benchmarks.peers.llama_cpp import library
from lvllm import engine
from lvllm.evaluation import load_questions, measure, passages, report
from lvllm.evaluation.models import LocalModel
from lvllm.evaluation.processes import Work
from lvllm.evaluation.questions import TINY_MOE
from lvllm.formats.gguf import TYPES

MODEL = Path(__file__).parents[1] / "examples/models/tiny-moe"
HIDDEN, INNER = 512, 256
MIXED = "Q4_K_M"
"""As llama.cpp's tool has it: half of the down projections are in Q6_K."""
Types = dict[str, Type]
"""The types of gate and up, and of down, by the number of the layer and the projection."""


def widened(folder: Path, out: Path) -> Path:
    """Write the demo model with zeros in rows of HIDDEN and INNER weights. Returns `out`."""
    config = json.loads((folder / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["moe_intermediate_size"]
    factor = HIDDEN // hidden
    assert factor == 4
    found = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        shape = list(tensor.shape)
        if name.endswith("layernorm.weight") or name == "model.norm.weight":
            tensor = tensor / 2
        for at, wide in _dimensions(name, shape, hidden, inner):
            shape[at] = wide
        found[name] = tensor.new_zeros(shape)
        found[name][tuple(slice(n) for n in tensor.shape)] = tensor
    out.mkdir()
    save_file(found, out / "model.safetensors", {"format": "pt"})
    sizes = {"hidden_size": HIDDEN, "moe_intermediate_size": INNER}
    sizes["rms_norm_eps"] = config["rms_norm_eps"] / factor
    (out / "config.json").write_text(json.dumps(config | sizes))
    for file in folder.glob("*token*"):
        (out / file.name).write_bytes(file.read_bytes())
    return out


def _dimensions(name: str, shape: list[int], hidden: int, inner: int) -> list[tuple[int, int]]:
    """Which dimensions of a tensor become wider, and how wide."""
    if ".experts." in name:
        return [(0, HIDDEN), (1, INNER)] if "down_proj" in name else [(0, INNER), (1, HIDDEN)]
    if name.endswith("layernorm.weight") or name == "model.norm.weight" or "o_proj" in name:
        return [(0, HIDDEN)]
    return [(len(shape) - 1, HIDDEN)] * (shape[-1] == hidden and "_norm" not in name)


class Ggml:
    """ggml's own quantisation."""

    def __init__(self) -> None:
        ggml = library("libggml-base.so")
        self._quantise = ggml.ggml_quantize_chunk
        self._quantise.argtypes = [
            *(c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p)
        ]
        self._quantise.restype = c_size_t
        self._needs_importance = ggml.ggml_quantize_requires_imatrix
        self._needs_importance.restype = c_bool

    def __call__(self, values: np.ndarray, kind: Type) -> np.ndarray:
        """The bytes of float32 [..., columns] in a type: uint8 [..., bytes of a row]."""
        if kind in (Type.F32, Type.F16, Type.BF16):
            return gguf.quantize(values, kind)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        values = np.ascontiguousarray(values, np.float32)
        columns = values.shape[-1]
        rows = values.size // columns
        out = np.empty((*values.shape[:-1], columns // block * size), np.uint8)
        given, taken = values.ctypes.data, out.ctypes.data
        ones = np.ones(columns, np.float32)
        importance = ones.ctypes.data if self._needs_importance(int(kind)) else None
        written = self._quantise(int(kind), given, taken, 0, rows, columns, importance)
        assert written == out.nbytes
        return out


def write(folder: Path, path: Path, name: str, quantise: Ggml) -> Path:
    """Write the widened model as a GGUF file with experts in one of TYPES, or in MIXED."""
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3MOE, config["num_hidden_layers"])
    file = gguf.GGUFWriter(path, "qwen3moe")
    file.add_block_count(config["num_hidden_layers"])
    file.add_context_length(config["max_position_embeddings"])
    file.add_embedding_length(HIDDEN)
    file.add_head_count(config["num_attention_heads"])
    file.add_head_count_kv(config["num_key_value_heads"])
    file.add_key_length(config["head_dim"])
    file.add_value_length(config["head_dim"])
    file.add_layer_norm_rms_eps(config["rms_norm_eps"])
    file.add_rope_freq_base(config["rope_theta"])
    file.add_expert_count(config["num_experts"])
    file.add_expert_used_count(config["num_experts_per_tok"])
    file.add_expert_feed_forward_length(INNER)

    def add(called: str, values: torch.Tensor, kind: Type) -> None:
        file.add_tensor(called, quantise(values.float().numpy(), kind), raw_dtype=kind)

    for one, tensor in tensors.items():
        if ".experts." in one:
            continue
        called = names.get_name(one, (".weight",))
        assert called is not None, one
        add(called, tensor, Type.F32 if tensor.dim() == 1 or "gate_inp" in called else Type.BF16)
    for layer in range(config["num_hidden_layers"]):
        for part in ("gate", "up", "down"):
            stack = torch.stack(
                [
                    tensors[f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"]
                    for expert in range(config["num_experts"])
                ]
            )
            add(f"blk.{layer}.ffn_{part}_exps.weight", stack, _type(name, layer, part))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


def _type(name: str, layer: int, part: str) -> Type:
    if name != MIXED:
        return Type[name]
    return Type.Q6_K if part == "down" and layer % 2 == 0 else Type.Q4_K


def main(
    markdown: Annotated[Path | None, typer.Option(help="Write the table into this page.")] = None,
    types: Annotated[str, typer.Option(help="Some of the types.")] = ",".join((*TYPES, MIXED)),
) -> None:
    """Measure the demo model in every type, and print a table."""
    quantise = Ggml()
    questions = load_questions(TINY_MOE)
    with TemporaryDirectory(prefix="lvllm-gguf-") as scratch:
        folder = widened(MODEL, Path(scratch) / "model")
        plain = LocalModel(str(folder), "bfloat16", "safetensors, bf16", lvllm=True)
        models = [plain]
        for name in types.split(","):
            file = write(folder, Path(scratch) / f"{name}.gguf", name, quantise)
            models.append(LocalModel(str(file), "bfloat16", name, own_tokenizer=str(folder)))
        read = passages.of_chats(questions, plain.tokenizer())
        rows = []
        for row in measure.measure(models, Work(questions, read, 1 << 20)):
            rows.append(report.Row(row.name, None, row.result, row.likelihoods, row.comparison))
            print(f"{row.name} is measured", file=sys.stderr, flush=True)
    about = report.notes(rows, read.source, plain.name)
    about.append(f"Experts on LvLLM's engine ({engine.info().isa}).")
    Console().print(report.table(rows))
    print("\n".join(about))
    if markdown is not None:
        report.write_page(markdown, report.markdown(rows, about))


if __name__ == "__main__":
    typer.run(main)
