"""Qwen3-MoE, Qwen2-MoE and OLMoE."""

from typing import Any

from lvllm.checkpoint.gguf.architecture import Architecture
from lvllm.checkpoint.gguf.families.common import (
    ATTENTION,
    HEAD_NORMS,
    NORMS,
    ROUTED,
    basics,
    experts,
    heads,
)
from lvllm.checkpoint.gguf.fields import Fields

__all__ = ["OLMOE", "QWEN2", "QWEN3", "SHARED", "qwen3"]

SHARED = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}


def qwen3(fields: Fields, of_heads: dict[str, Any] | None = None) -> dict[str, Any]:
    """The configuration of Qwen3-MoE; other models of Qwen have other heads of attention."""
    size = fields.whole("expert_feed_forward_length", 1, 1 << 20)
    return {
        **basics(fields),
        **(of_heads or heads(fields)),
        **experts(fields),
        "moe_intermediate_size": size,
        "intermediate_size": fields.whole("feed_forward_length", 0, 1 << 20, size) or size,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
        # The file does not say so; all models of this family divide by the sum.
        "norm_topk_prob": True,
        "attention_bias": False,
    }


def _qwen2(fields: Fields) -> dict[str, Any]:
    shared = fields.whole("expert_shared_feed_forward_length", 1, 1 << 20)
    return {
        **qwen3(fields),
        "shared_expert_intermediate_size": shared,
        # The file does not say so; no model of this family divides by the sum.
        "norm_topk_prob": False,
        "qkv_bias": True,
    }


def _olmoe(fields: Fields) -> dict[str, Any]:
    found = {
        **basics(fields),
        **heads(fields),
        **experts(fields),
        "intermediate_size": fields.whole("feed_forward_length", 1, 1 << 20),
        # As in qwen2moe.
        "norm_topk_prob": False,
    }
    if fields.has("attention.clamp_kqv"):
        found["clip_qkv"] = fields.number("attention.clamp_kqv")
    return found


QWEN3 = Architecture(
    "Qwen3MoeForCausalLM", "qwen3_moe", qwen3, {**NORMS, **ATTENTION, **HEAD_NORMS, **ROUTED}
)
QWEN2 = Architecture(
    "Qwen2MoeForCausalLM", "qwen2_moe", _qwen2, {**NORMS, **ATTENTION, **ROUTED, **SHARED}
)
OLMOE = Architecture(
    "OlmoeForCausalLM", "olmoe", _olmoe, {**NORMS, **ATTENTION, **HEAD_NORMS, **ROUTED}
)
