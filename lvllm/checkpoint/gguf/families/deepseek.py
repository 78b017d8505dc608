"""DeepSeek-V2, V3 and R1, Kimi-K2 and GLM-4.7-Flash, which have latent attention."""

from collections.abc import Sequence
from typing import Any

import torch

from lvllm.checkpoint.gguf.architecture import Architecture, Change
from lvllm.checkpoint.gguf.families.common import (
    DENSE,
    NORMS,
    ROUTED,
    SHARED,
    basics,
    chosen_by_bias,
    experts,
    scoring,
)
from lvllm.checkpoint.gguf.fields import Fields

__all__ = ["DEEPSEEK"]

LATENT = {
    "attn_q": "self_attn.q_proj",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    # Older files have the first one, newer files the others.
    "attn_kv_b": "self_attn.kv_b_proj",
    "attn_k_b": "self_attn.k_b_proj",
    "attn_v_b": "self_attn.v_b_proj",
    "attn_output": "self_attn.o_proj",
}


def _config(fields: Fields) -> dict[str, Any]:
    rotary = fields.whole("rope.dimension_count", 1, 1 << 12)
    # Newer files have the heads of a decoding step under the plain names.
    suffix = "_mla" if fields.has("attention.key_length_mla") else ""
    key = fields.whole(f"attention.key_length{suffix}", rotary + 1, 1 << 16)
    found = basics(fields)
    of_model = experts(fields, "n_routed_experts")
    groups = fields.whole("expert_group_count", 1, of_model["n_routed_experts"], 1)
    score, biased = scoring(fields), chosen_by_bias(fields)
    third = biased or score == "sigmoid"
    return {
        **found,
        **of_model,
        "architectures": [f"DeepseekV{3 if third else 2}ForCausalLM"],
        "model_type": f"deepseek_v{3 if third else 2}",
        "num_key_value_heads": found["num_attention_heads"],
        "q_lora_rank": fields.whole("attention.q_lora_rank", 1, 1 << 18)
        if fields.has("attention.q_lora_rank")
        else None,
        "kv_lora_rank": fields.whole("attention.kv_lora_rank", 1, 1 << 18),
        "qk_rope_head_dim": rotary,
        "qk_nope_head_dim": key - rotary,
        "v_head_dim": fields.whole(f"attention.value_length{suffix}", 1, 1 << 16),
        "intermediate_size": fields.whole("feed_forward_length", 1, 1 << 20),
        "moe_intermediate_size": fields.whole("expert_feed_forward_length", 1, 1 << 20),
        "n_shared_experts": fields.whole("expert_shared_count", 0, 1 << 10, 0) or None,
        "first_k_dense_replace": fields.dense_layers,
        "moe_layer_freq": 1,
        "n_group": groups,
        "topk_group": fields.whole("expert_group_used_count", 1, groups, groups),
        "topk_method": "noaux_tc" if biased else "group_limited_greedy" if groups > 1 else "greedy",
        "scoring_func": score,
        "norm_topk_prob": fields.flag("expert_weights_norm", False),
        "routed_scaling_factor": fields.number("expert_weights_scale", 1.0),
        **_scaling(fields, found),
        "attention_bias": False,
        "rope_interleave": True,
    }


def _scaling(fields: Fields, found: dict[str, Any]) -> dict[str, Any]:
    """The factor of the scores, which these models have with YaRN."""
    key = "rope.scaling.yarn_log_multiplier"
    if "rope_scaling" not in found or not fields.has(key):
        return {}
    # Files of this family have a tenth of it. Both numbers are alike in all models.
    factor = 10 * fields.number(key)
    return {"rope_scaling": found["rope_scaling"] | {"mscale": factor, "mscale_all_dim": factor}}


def _join(fields: Fields, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Keys [heads, rank, size] and values [heads, size, rank], one head after the other."""
    keys, values = parts
    return torch.cat((keys.transpose(1, 2), values), 1).flatten(0, 1)


DEEPSEEK = Architecture(
    "DeepseekV3ForCausalLM",
    "deepseek_v3",
    _config,
    {**NORMS, **LATENT, **DENSE, **ROUTED, **SHARED},
    {
        "self_attn.kv_b_proj.weight": Change(
            ("self_attn.k_b_proj.weight", "self_attn.v_b_proj.weight"), _join
        )
    },
)
