"""A random checkpoint of Step-3.5, and the model itself in float32, since transformers lacks it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

VOCABULARY, HIDDEN, HEAD = 384, 128, 32
SLIDING, FULL = "sliding_attention", "full_attention"

CONFIG: dict[str, Any] = {
    "architectures": ["Step3p5ForCausalLM"],
    "model_type": "step3p5",
    "dtype": "bfloat16",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "num_attention_heads": 4,
    "num_attention_groups": 2,
    "head_dim": HEAD,
    "layer_types": [FULL, SLIDING, FULL],
    "attention_other_setting": {
        "attention_type": SLIDING,
        "num_attention_heads": 6,
        "num_attention_groups": 2,
        "head_dim": HEAD,
    },
    "sliding_window": 16,
    "rope_theta": [50000.0, 10000.0, 50000.0],
    "partial_rotary_factors": [0.5, 1.0, 0.5],
    "use_head_wise_attn_gate": True,
    "moe_layers_enum": "1,2",
    "moe_num_experts": 8,
    "moe_top_k": 3,
    "moe_intermediate_size": 72,
    "share_expert_dim": 96,
    "norm_expert_weight": True,
    "use_moe_router_bias": True,
    "moe_router_activation": "sigmoid",
    "moe_router_scaling_factor": 3.0,
    "need_fp32_gate": True,
    "swiglu_limits": [0.0, 0.0, 7.0],
    "swiglu_limits_shared": [0.0, 0.0, 0.0],
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make(folder: Path, seed: int = 0) -> Path:
    """Write a bfloat16 checkpoint to `folder`.

    As in the published one, each projection of a layer has one tensor for all experts.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, std: float | None = None) -> torch.Tensor:
        scale = shape[-1] ** -0.5 if std is None else std
        return (torch.randn(*shape, generator=generator) * scale).bfloat16()

    config = CONFIG
    experts, rows = config["moe_num_experts"], config["moe_intermediate_size"]
    tensors = {
        "model.embed_tokens.weight": draw(VOCABULARY, HIDDEN, std=1),
        "model.norm.weight": draw(HIDDEN, std=0.1),
        "lm_head.weight": draw(VOCABULARY, HIDDEN),
    }
    for layer, kind in enumerate(config["layer_types"]):
        heads, groups = _heads(config, kind)
        own = {
            "input_layernorm": draw(HIDDEN, std=0.1),
            "post_attention_layernorm": draw(HIDDEN, std=0.1),
            "self_attn.q_proj": draw(heads * HEAD, HIDDEN),
            "self_attn.k_proj": draw(groups * HEAD, HIDDEN),
            "self_attn.v_proj": draw(groups * HEAD, HIDDEN),
            "self_attn.o_proj": draw(HIDDEN, heads * HEAD),
            "self_attn.g_proj": draw(heads, HIDDEN),
            "self_attn.q_norm": draw(HEAD, std=0.1),
            "self_attn.k_norm": draw(HEAD, std=0.1),
        }
        if _has_experts(config, layer):
            own |= {
                "moe.gate": draw(experts, HIDDEN),
                "moe.gate_proj": draw(experts, rows, HIDDEN),
                "moe.up_proj": draw(experts, rows, HIDDEN),
                "moe.down_proj": draw(experts, HIDDEN, rows),
            }
            bias = torch.rand(experts, generator=generator) / 5
            tensors[f"model.layers.{layer}.moe.router_bias"] = bias
            part, size = "share_expert", config["share_expert_dim"]
        else:
            part, size = "mlp", config["intermediate_size"]
        own |= {
            f"{part}.gate_proj": draw(size, HIDDEN),
            f"{part}.up_proj": draw(size, HIDDEN),
            f"{part}.down_proj": draw(HIDDEN, size),
        }
        tensors |= {f"model.layers.{layer}.{name}.weight": data for name, data in own.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


class Reference:
    """The model of the checkpoint in `folder`. It computes in float32, on whole sequences."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.weights = {
            name: torch.nn.Parameter(data.float(), requires_grad=False)
            for name, data in load_file(folder / "model.safetensors").items()
        }

    def named_parameters(self) -> Any:
        return self.weights.items()

    def __call__(self, input_ids: torch.Tensor) -> Any:
        (ids,) = input_ids
        x = self.weights["model.embed_tokens.weight"][ids]
        for layer, kind in enumerate(self.config["layer_types"]):
            x = x + self._attention(layer, kind, self._norm(x, layer, "input_layernorm"))
            h = self._norm(x, layer, "post_attention_layernorm")
            if _has_experts(self.config, layer):
                x = x + self._experts(layer, h) + self._mlp(layer, "share_expert", h)
            else:
                x = x + self._mlp(layer, "mlp", h)
        x = self._normed(x, self.weights["model.norm.weight"])
        return SimpleNamespace(logits=(x @ self.weights["lm_head.weight"].T)[None])

    def _of(self, layer: int, name: str) -> torch.Tensor:
        return self.weights[f"model.layers.{layer}.{name}"]

    def _normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], 1 + weight, self.config["rms_norm_eps"])

    def _norm(self, x: torch.Tensor, layer: int, name: str) -> torch.Tensor:
        return self._normed(x, self._of(layer, f"{name}.weight"))

    def _mlp(self, layer: int, name: str, x: torch.Tensor) -> torch.Tensor:
        gate, up, down = (
            self._of(layer, f"{name}.{part}_proj.weight") for part in ("gate", "up", "down")
        )
        return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T

    def _experts(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        scores = (x @ self._of(layer, "moe.gate.weight").T).sigmoid()
        chosen = (scores + self._of(layer, "moe.router_bias")).topk(self.config["moe_top_k"])[1]
        weights = scores.gather(1, chosen)
        weights = weights / weights.sum(-1, keepdim=True) * self.config["moe_router_scaling_factor"]
        gate, up, down = (
            self._of(layer, f"moe.{part}_proj.weight")[chosen] for part in ("gate", "up", "down")
        )
        gate, up = (torch.einsum("tkih,th->tki", part, x) for part in (gate, up))
        limit = self.config["swiglu_limits"][layer]
        gate = F.silu(gate)
        if limit:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return torch.einsum("tkhi,tki,tk->th", down, gate * up, weights)

    def _attention(self, layer: int, kind: str, x: torch.Tensor) -> torch.Tensor:
        heads, groups = _heads(self.config, kind)
        q, k, v = (
            (x @ self._of(layer, f"self_attn.{part}_proj.weight").T).unflatten(-1, (-1, HEAD))
            for part in "qkv"
        )
        q = self._rotated(layer, self._norm(q, layer, "self_attn.q_norm"))
        k = self._rotated(layer, self._norm(k, layer, "self_attn.k_norm"))
        k, v = (part.repeat_interleave(heads // groups, dim=1) for part in (k, v))
        place = torch.arange(len(x))
        distance = place[:, None] - place
        window = self.config["sliding_window"] if kind == SLIDING else len(x)
        scores = torch.einsum("qhd,khd->hqk", q, k) * HEAD**-0.5
        scores = scores.masked_fill((distance < 0) | (distance >= window), -torch.inf)
        y = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
        y = y * (x @ self._of(layer, "self_attn.g_proj.weight").T).sigmoid()[..., None]
        return y.flatten(1) @ self._of(layer, "self_attn.o_proj.weight").T

    def _rotated(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """Apply the position encoding to the first dimensions of each head, in two halves."""
        size = int(HEAD * self.config["partial_rotary_factors"][layer])
        frequency = self.config["rope_theta"][layer] ** (-torch.arange(0, size, 2) / size)
        angle = (torch.arange(len(x))[:, None] * frequency)[:, None]
        a, b, rest = x.split([size // 2, size // 2, HEAD - size], dim=-1)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


def _heads(config: dict[str, Any], kind: str) -> tuple[int, int]:
    where = config["attention_other_setting"] if kind == SLIDING else config
    return where["num_attention_heads"], where["num_attention_groups"]


def _has_experts(config: dict[str, Any], layer: int) -> bool:
    return str(layer) in config["moe_layers_enum"].split(",")
