"""The model that is measured: the widths of Qwen3-30B-A3B, with fewer layers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """The sizes of a Qwen3 Mixture-of-Experts model."""

    layers: int = 5
    hidden: int = 2048
    heads: int = 32
    kv_heads: int = 4
    head_dim: int = 128
    experts: int = 128
    top_k: int = 8
    intermediate: int = 768
    """The width of one expert."""
    vocabulary: int = 151936
    context: int = 4096
    rope_theta: float = 1e6
    norm_epsilon: float = 1e-6

    @property
    def config(self) -> dict[str, object]:
        """The contents of config.json."""
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": self.context,
            "mlp_only_layers": [],
            "moe_intermediate_size": self.intermediate,
            "norm_topk_prob": True,
            "num_attention_heads": self.heads,
            "num_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": self.norm_epsilon,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "vocab_size": self.vocabulary,
        }
