"""Write the same random model as safetensors in bf16 and as GGUF in 4 and 8 bits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from benchmarks.whole_model.shape import Shape

GGUF = "model.gguf"
# The usual files have 4-bit experts, and 8 bits or so for what is small and read for every token.
DENSE, EXPERTS = Type.Q8_0, Type.Q4_0

# The names of a layer's tensors in safetensors and in GGUF, and how they are stored there.
NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
PROJECTIONS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
EXPERT_PARTS = {
    "gate_proj": "ffn_gate_exps",
    "up_proj": "ffn_up_exps",
    "down_proj": "ffn_down_exps",
}


def write(shape: Shape, folder: Path) -> None:
    """Write config.json, a tokenizer, safetensors and model.gguf, unless they are in `folder`.

    The norms are ones, and all other weights are normally distributed.
    """
    if (folder / "written").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape.config, indent=1))
    tokenizer(shape.vocabulary).save_pretrained(folder)
    file = _gguf(shape, folder / GGUF)
    where: dict[str, str] = {}
    for number, tensors in enumerate(_parts(shape, file)):
        name = f"model-{number:05}.safetensors"
        save_file(tensors, folder / name, {"format": "pt"})
        where |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    (folder / "written").touch()


def tokenizer(vocabulary: int) -> Any:
    """A tokenizer with a word for each token, so that the model can be served with texts."""
    words = {f"w{token}": token for token in range(vocabulary)}
    made = Tokenizer(WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="w2", pad_token="w0")


def _gguf(shape: Shape, path: Path) -> gguf.GGUFWriter:
    file = gguf.GGUFWriter(path, "qwen3moe")
    file.add_block_count(shape.layers)
    file.add_context_length(shape.context)
    file.add_embedding_length(shape.hidden)
    file.add_feed_forward_length(shape.intermediate)
    file.add_head_count(shape.heads)
    file.add_head_count_kv(shape.kv_heads)
    file.add_key_length(shape.head_dim)
    file.add_value_length(shape.head_dim)
    file.add_rope_freq_base(shape.rope_theta)
    file.add_layer_norm_rms_eps(shape.norm_epsilon)
    file.add_expert_count(shape.experts)
    file.add_expert_used_count(shape.top_k)
    file.add_expert_feed_forward_length(shape.intermediate)
    file.add_vocab_size(shape.vocabulary)
    file.add_tokenizer_model("no_vocab")  # Prompts are given as token ids.
    return file


def _parts(shape: Shape, file: gguf.GGUFWriter) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of each file of safetensors, which are added to the GGUF file as well."""
    generator = torch.Generator().manual_seed(0)

    def random(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator).mul_(0.02).bfloat16()

    def matrix(name: str, gguf_name: str, rows: int, columns: int) -> dict[str, torch.Tensor]:
        weight = random(rows, columns)
        file.add_tensor(gguf_name, _quantized([weight], DENSE), raw_dtype=DENSE)
        return {name: weight}

    def ones(name: str, gguf_name: str, size: int) -> dict[str, torch.Tensor]:
        file.add_tensor(gguf_name, np.ones(size, np.float32))
        return {name: torch.ones(size).bfloat16()}

    hidden, vocabulary = shape.hidden, shape.vocabulary
    yield (
        matrix("model.embed_tokens.weight", "token_embd.weight", vocabulary, hidden)
        | matrix("lm_head.weight", "output.weight", vocabulary, hidden)
        | ones("model.norm.weight", "output_norm.weight", hidden)
    )
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes = {"attn_q": (query, hidden), "attn_output": (hidden, query)}
    for number in range(shape.layers):
        layer, block = f"model.layers.{number}", f"blk.{number}"
        tensors: dict[str, torch.Tensor] = {}
        for name, short in NORMS.items():
            size = shape.head_dim if short.endswith(("q_norm", "k_norm")) else hidden
            tensors |= ones(f"{layer}.{name}.weight", f"{block}.{short}.weight", size)
        for name, short in PROJECTIONS.items():
            rows, columns = sizes.get(short, (key, hidden))
            names = f"{layer}.{name}.weight", f"{block}.{short}.weight"
            tensors |= matrix(*names, rows, columns)
        router = random(shape.experts, hidden)
        tensors[f"{layer}.mlp.gate.weight"] = router
        file.add_tensor(f"{block}.ffn_gate_inp.weight", router.float().numpy())
        for part, short in EXPERT_PARTS.items():
            down = part == "down_proj"
            rows, columns = (hidden, shape.intermediate)[:: 1 if down else -1]
            experts = [random(rows, columns) for _ in range(shape.experts)]
            stored = _quantized(experts, EXPERTS)
            file.add_tensor(
                f"{block}.{short}.weight",
                stored.reshape(shape.experts, rows, -1),
                raw_dtype=EXPERTS,
            )
            tensors |= {
                f"{layer}.mlp.experts.{i}.{part}.weight": expert for i, expert in enumerate(experts)
            }
        yield tensors


def _quantized(matrices: list[torch.Tensor], kind: Type) -> np.ndarray:
    """The matrices' rows below each other, as bytes of the type."""
    return np.concatenate([gguf.quants.quantize(m.float().numpy(), kind) for m in matrices])
