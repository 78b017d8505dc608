"""Qwen3-MoE as a small trainable PyTorch module, equal in arithmetic to the released models."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

MAX_LENGTH = 1024  # tokens
CONFIG: dict[str, object] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "decoder_sparse_step": 1,
    "head_dim": 32,
    "hidden_act": "silu",
    # Multiples of 128, so that every weight format (groups of 16 to 128, blocks of 128x128) fits.
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 384,
    "max_position_embeddings": MAX_LENGTH,
    "mlp_only_layers": [],
    "moe_intermediate_size": 128,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.01,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
}
HIDDEN, EXPERT_HIDDEN, HEAD, HEADS, KV_HEADS, LAYERS, EXPERTS, TOP_K = 128, 128, 32, 4, 2, 4, 16, 4


def _linear(outputs: int, inputs: int = HIDDEN) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


class Norm(nn.RMSNorm):
    def __init__(self, size: int = HIDDEN) -> None:
        super().__init__(size, eps=1e-6)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.o_proj = _linear(HEADS * HEAD), _linear(HIDDEN, HEADS * HEAD)
        self.k_proj, self.v_proj = _linear(KV_HEADS * HEAD), _linear(KV_HEADS * HEAD)
        self.q_norm, self.k_norm = Norm(HEAD), Norm(HEAD)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        rows, length, _ = x.shape

        def heads(y: Tensor) -> Tensor:
            return y.view(rows, length, -1, HEAD)

        def rotate(y: Tensor) -> Tensor:
            low, high = y.transpose(1, 2).chunk(2, -1)
            return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)

        q = rotate(self.q_norm(heads(self.q_proj(x))))
        k = rotate(self.k_norm(heads(self.k_proj(x))))
        v = heads(self.v_proj(x)).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).reshape(rows, length, -1))


class SparseMLP(nn.Module):
    """16 SwiGLU experts; a token's 4 likeliest are mixed by their renormalised probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = _linear(EXPERTS)
        self.gate_up = nn.Parameter(torch.empty(EXPERTS, 2 * EXPERT_HIDDEN, HIDDEN))
        self.down = nn.Parameter(torch.empty(EXPERTS, HIDDEN, EXPERT_HIDDEN))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [tokens, hidden] -> the same shape, and the load-balancing loss (1.0 when even)."""
        probabilities = self.gate(x).float().softmax(-1)
        weights, ids = probabilities.topk(TOP_K, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        order = ids.flatten().argsort(stable=True)
        counts = ids.flatten().bincount(minlength=EXPERTS)
        tokens = order // TOP_K
        sizes = counts.tolist()
        outputs = []
        for rows, gate_up, down in zip(
            x.index_select(0, tokens).split(sizes),
            self.gate_up.unbind(),
            self.down.unbind(),
            strict=True,
        ):
            gate, up = F.linear(rows, gate_up).chunk(2, -1)
            outputs.append(F.linear(F.silu(gate) * up, down))
        mixed = torch.cat(outputs) * weights.flatten()[order, None].to(x.dtype)
        load = counts / counts.sum()
        balance = EXPERTS * (load * probabilities.mean(0)).sum()
        return torch.zeros_like(x).index_add(0, tokens, mixed), balance


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = Norm(), Norm()
        self.self_attn, self.mlp = Attention(), SparseMLP()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        mixed, balance = self.mlp(self.post_attention_layernorm(x).flatten(0, 1))
        return x + mixed.view_as(x), balance


class TinyMoE(nn.Module):
    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, HIDDEN)
        layers = [Layer() for _ in range(LAYERS)]
        self.layers = nn.ModuleList(layers)
        self.norm, self.lm_head = Norm(), _linear(vocabulary)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        nn.init.normal_(self.embed_tokens.weight, std=1.0)
        for layer in layers:  # every block starts as the identity
            nn.init.zeros_(layer.self_attn.o_proj.weight)
            nn.init.normal_(layer.mlp.down, std=0.01)

    def forward(self, ids: Tensor, mask: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [wanted, vocabulary] at the wanted positions, and the mean balance loss.

        ids [rows, length] int64; mask [rows, 1, length, length] bool, True where a position may
        look; wanted [rows, length] bool.
        """
        frequencies = 10000.0 ** (-torch.arange(0, HEAD, 2) / HEAD)
        angles = torch.arange(ids.shape[1])[:, None] * frequencies
        x = self.embed_tokens(ids)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        balance = torch.zeros(())
        for layer in self.layers:
            x, layer_balance = layer(x, cos, sin, mask)
            balance = balance + layer_balance / LAYERS
        return self.lm_head(self.norm(x[wanted])), balance


def checkpoint_tensors(model: TinyMoE) -> dict[str, Tensor]:
    """The weights in bfloat16 under the names of released Qwen3-MoE checkpoints."""
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        value = value.to(torch.bfloat16)
        prefix, _, leaf = name.rpartition(".")
        if leaf == "gate_up":
            parts = {"gate_proj": value[:, :EXPERT_HIDDEN], "up_proj": value[:, EXPERT_HIDDEN:]}
        elif leaf == "down":
            parts = {"down_proj": value}
        else:
            tensors[name if name.startswith("lm_head") else f"model.{name}"] = value
            continue
        for part, experts in parts.items():
            for i, expert in enumerate(experts):
                tensors[f"model.{prefix}.experts.{i}.{part}.weight"] = expert.contiguous()
    return tensors


def save(model: TinyMoE, directory: Path, *, end: int, pad: int) -> None:
    """Writes model.safetensors, config.json and generation_config.json (greedy decoding)."""
    save_file(checkpoint_tensors(model), directory / "model.safetensors", {"format": "pt"})
    tokens = {"bos_token_id": None, "eos_token_id": end, "pad_token_id": pad}
    vocabulary = model.embed_tokens.num_embeddings
    config = {**CONFIG, **tokens, "vocab_size": vocabulary}
    generation = {**tokens, "do_sample": False, "temperature": 0.0}
    for name, content in (("config", config), ("generation_config", generation)):
        text = json.dumps(content, indent=2, sort_keys=True)
        (directory / f"{name}.json").write_text(text + "\n", encoding="utf-8")
