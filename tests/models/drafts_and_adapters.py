"""Draft models for speculative decoding, and a LoRA adapter.

All are random and fit the demo model's architecture. `with_mtp` alone makes a model of its own.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.models.make import make

WEIGHTS = "model.safetensors"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
RANK, ALPHA = 4, 8


def noisy(model: Path, folder: Path, noise: float) -> Path:
    """A copy of `model` with `noise` times its standard deviation added to every weight: a draft
    that is right most of the time.
    """
    shutil.copytree(model, folder)
    tensors = load_file(model / WEIGHTS)
    for name, data in tensors.items():
        values = data.float()
        if data.dim() > 1:
            tensors[name] = (values + noise * values.std() * torch.randn_like(values)).to(
                data.dtype
            )
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


def eagle(model: Path, folder: Path, version: int) -> Path:
    """An EAGLE (1) or EAGLE-3 draft for `model`: one dense layer on the model's hidden states."""
    of = json.loads((model / "config.json").read_text())
    hidden, vocabulary = of["hidden_size"], of["vocab_size"]
    query, key = (
        of[name] * of["head_dim"] for name in ("num_attention_heads", "num_key_value_heads")
    )
    intermediate = 192
    config = {
        "architectures": ["LlamaForCausalLM" if version == 1 else "LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "intermediate_size": intermediate,
        "hidden_act": "silu",
        "draft_vocab_size": vocabulary,
        "eagle_aux_hidden_state_layer_ids": [1, 2, 3],
    }
    same = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    config |= {name: of[name] for name in (*same, "max_position_embeddings", "rms_norm_eps")}
    layer = "layers.0" if version == 1 else "midlayer"
    norms = ["post_attention_layernorm"]
    # EAGLE-3 sees three layers' states at a time, and the token's embedding beside them.
    states, inputs = (2, hidden) if version == 1 else (3, 2 * hidden)
    shapes = {
        "fc": (hidden, states * hidden),
        f"{layer}.self_attn.q_proj": (query, inputs),
        f"{layer}.self_attn.k_proj": (key, inputs),
        f"{layer}.self_attn.v_proj": (key, inputs),
        f"{layer}.self_attn.o_proj": (hidden, query),
        f"{layer}.mlp.gate_proj": (intermediate, hidden),
        f"{layer}.mlp.up_proj": (intermediate, hidden),
        f"{layer}.mlp.down_proj": (hidden, intermediate),
    }
    if version == 3:
        shapes["lm_head"] = (vocabulary, hidden)
        norms += ["input_layernorm", "hidden_norm"]
    tensors = {f"{name}.weight": _random(*shape) for name, shape in shapes.items()}
    tensors |= {f"{layer}.{name}.weight": torch.ones(hidden).bfloat16() for name in norms}
    if version == 3:
        tensors["norm.weight"] = torch.ones(hidden).bfloat16()
    else:
        tensors["embed_tokens.weight"] = load_file(model / WEIGHTS)["model.embed_tokens.weight"]
    return _write(folder, config, tensors, WEIGHTS)


def with_mtp(architecture: str, folder: Path, seed: int, **changes: Any) -> tuple[Path, Path]:
    """A random model of three layers and a fourth for multi-token prediction, and the same without
    it: (checkpoint, values for the reference).
    """
    layers = 3
    whole = make(architecture, folder / "mtp", seed, num_hidden_layers=layers + 1, **changes)
    tensors = load_file(whole / WEIGHTS)
    draft = f"model.layers.{layers}."
    embedding, head = tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]
    hidden = embedding.shape[1]
    plain = {name: data for name, data in tensors.items() if not name.startswith(draft)}
    config = json.loads((whole / "config.json").read_text()) | {"num_hidden_layers": layers}
    for name in ("layer_types", "mlp_layer_types"):
        config.pop(name, None)
    values = _write(folder / "plain", config | {"num_nextn_predict_layers": 0}, plain, WEIGHTS)
    tensors |= {
        f"{draft}{name}.weight": torch.ones(hidden).bfloat16()
        for name in ("enorm", "hnorm", "shared_head.norm")
    }
    tensors |= {
        f"{draft}eh_proj.weight": _random(hidden, 2 * hidden),
        f"{draft}shared_head.head.weight": head.clone(),
        f"{draft}embed_tokens.weight": embedding.clone(),
    }
    return _write(whole, config | {"num_nextn_predict_layers": 1}, tensors, WEIGHTS), values


def adapter(model: Path, folder: Path, experts: bool = False) -> Path:
    """A LoRA adapter for the attention of `model`, and for one of its `experts` if asked for."""
    tensors = {}
    for name, data in load_file(model / WEIGHTS).items():
        module = name.removesuffix(".weight")
        if not module.endswith(ATTENTION) and not (experts and ".experts.0.up" in module):
            continue
        rows, columns = data.shape
        prefix = f"base_model.model.{module}"
        tensors[f"{prefix}.lora_A.weight"] = _random(RANK, columns)
        tensors[f"{prefix}.lora_B.weight"] = (torch.randn(rows, RANK) * 0.1).bfloat16()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": [*ATTENTION, "up_proj"],
        "bias": "none",
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def merged(model: Path, adapter: Path, folder: Path) -> Path:
    """`model` with the `adapter` added to its weights, for the reference."""
    shutil.copytree(model, folder)
    tensors = load_file(model / WEIGHTS)
    parts = load_file(adapter / "adapter_model.safetensors")
    for name in [name for name in parts if ".lora_A." in name]:
        a, b = parts[name].float(), parts[name.replace("lora_A", "lora_B")].float()
        module = name.removeprefix("base_model.model.").replace(".lora_A", "")
        # In float32: rounded to bfloat16, what is added to a weight would be off by as much.
        tensors[module] = tensors[module].float() + ALPHA / RANK * (b @ a)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


def _random(rows: int, columns: int) -> torch.Tensor:
    return (torch.randn(rows, columns) * columns**-0.5).bfloat16()


def _write(
    folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], weights: str
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    save_file(tensors, folder / weights, {"format": "pt"})
    return folder
