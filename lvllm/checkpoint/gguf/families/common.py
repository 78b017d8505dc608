"""Names of tensors and keys of config.json that several families have in common."""

from typing import Any

from lvllm.checkpoint.gguf.fields import Fields
from lvllm.checkpoint.headers import CheckpointError

__all__ = [
    "ATTENTION",
    "DENSE",
    "HEAD_NORMS",
    "NORMS",
    "ROUTED",
    "SHARED",
    "basics",
    "chosen_by_bias",
    "experts",
    "heads",
    "scoring",
]

NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
DENSE = {
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROUTED = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
}
SHARED = {
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
SCORING = {1: "softmax", 2: "sigmoid"}
"""What the numbers of `expert_gating_func` mean."""


def basics(fields: Fields) -> dict[str, Any]:
    """The keys of config.json that all families have."""
    tensors = fields.header.tensors
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{fields.header.file}: has no matrix 'token_embd.weight'")
    found = {
        "hidden_size": fields.whole("embedding_length", 1, 1 << 18),
        "num_hidden_layers": fields.layers,
        "num_attention_heads": fields.whole("attention.head_count", 1, 1 << 12),
        "hidden_act": "silu",
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": fields.whole("context_length", 1, 1 << 30),
        "rope_theta": fields.number("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in tensors,
        "vocab_size": embedding.shape[1],
        # A GGUF file does not say which dtype the model was trained in. bfloat16 holds them all.
        "torch_dtype": "bfloat16",
    }
    return found | _rope_scaling(fields) | _token_ids(fields)


def heads(fields: Fields, *, partial: bool = False) -> dict[str, Any]:
    """The heads of attention without latent values.

    With `partial`, RoPE may rotate a part of a head's values.
    """
    count = fields.whole("attention.head_count", 1, 1 << 12)
    hidden = fields.whole("embedding_length", 1, 1 << 18)
    size = fields.whole("attention.key_length", 1, 1 << 16, max(1, hidden // count))
    fields.whole("attention.value_length", size, size, size)
    if not partial:
        fields.whole("rope.dimension_count", size, size, size)
    return {
        "num_key_value_heads": fields.whole("attention.head_count_kv", 1, count, count),
        "head_dim": size,
    }


def experts(fields: Fields, count: str = "num_experts") -> dict[str, Any]:
    number = fields.whole("expert_count", 1, 1 << 16)
    return {
        count: number,
        "num_experts_per_tok": fields.whole("expert_used_count", 1, number),
    }


def chosen_by_bias(fields: Fields) -> bool:
    """Whether routers have a bias that decides which experts a token takes."""
    return any(name.endswith(".exp_probs_b.bias") for name in fields.header.tensors)


def scoring(fields: Fields) -> str:
    """What makes the router's weights of its numbers: softmax or sigmoid.

    Files that are older than the field are of models with softmax, and none of these has a bias.
    """
    default = 2 if chosen_by_bias(fields) else 1
    return SCORING[fields.whole("expert_gating_func", 1, 2, default)]


def _rope_scaling(fields: Fields) -> dict[str, Any]:
    kind = fields.text("rope.scaling.type", "none")
    if kind == "none":
        return {}
    if kind not in ("linear", "yarn"):
        raise fields.refuse("rope.scaling.type", kind, "none, linear or yarn is wanted")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": fields.number("rope.scaling.factor")}
    if kind == "yarn":
        length = fields.whole("rope.scaling.original_context_length", 1, 1 << 30)
        scaling["original_max_position_embeddings"] = length
        scaling["beta_fast"] = fields.number("rope.scaling.yarn_beta_fast", 32.0)
        scaling["beta_slow"] = fields.number("rope.scaling.yarn_beta_slow", 1.0)
    return {"rope_scaling": scaling}


def _token_ids(fields: Fields) -> dict[str, Any]:
    """The tokens at which a text begins and ends. Turns may end with tokens of their own."""

    def ids(*names: str) -> list[int]:
        found = (fields.header.fields.get(f"tokenizer.ggml.{name}_token_id") for name in names)
        return list(dict.fromkeys(one for one in found if type(one) is int))

    first, ends = ids("bos"), ids("eos", "eot", "eom")
    known = {"bos_token_id": first[0]} if first else {}
    return known | ({"eos_token_id": ends if len(ends) > 1 else ends[0]} if ends else {})
