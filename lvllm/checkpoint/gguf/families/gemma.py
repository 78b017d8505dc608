"""Gemma 4 with experts, of which each layer has some beside a dense part."""

from typing import Any

from lvllm.checkpoint.gguf.architecture import Architecture
from lvllm.checkpoint.gguf.families.common import ATTENTION, DENSE, HEAD_NORMS, basics, experts
from lvllm.checkpoint.gguf.fields import Fields

__all__ = ["GEMMA4"]


def _config(fields: Fields) -> dict[str, Any]:
    found, of_model = basics(fields), experts(fields)
    del found["hidden_act"]
    theta = found.pop("rope_theta")
    slides = fields.for_layers("attention.sliding_window_pattern")
    key_heads = fields.for_layers("attention.head_count_kv")
    heads = {bool(slide): count for slide, count in zip(slides, key_heads, strict=True)}
    tensors = fields.header.tensors
    full = [layer for layer, slide in enumerate(slides) if not slide]
    return {
        **found,
        "num_experts": of_model["num_experts"],
        "top_k_experts": of_model["num_experts_per_tok"],
        "enable_moe_block": True,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size_per_layer_input": 0,
        "intermediate_size": fields.whole("feed_forward_length", 1, 1 << 20),
        "moe_intermediate_size": fields.whole("expert_feed_forward_length", 1, 1 << 20),
        "layer_types": ["sliding_attention" if one else "full_attention" for one in slides],
        "sliding_window": fields.whole("attention.sliding_window", 1, 1 << 30),
        "head_dim": fields.whole("attention.key_length_swa", 1, 1 << 16),
        "global_head_dim": fields.whole("attention.key_length", 1, 1 << 16),
        "num_key_value_heads": heads.get(True) or key_heads[0],
        "num_global_key_value_heads": heads.get(False) or key_heads[0],
        "num_kv_shared_layers": fields.whole("attention.shared_kv_layers", 0, 0, 0),
        "attention_k_eq_v": any(f"blk.{layer}.attn_v.weight" not in tensors for layer in full),
        "final_logit_softcapping": fields.number("final_logit_softcapping"),
        "rope_parameters": {
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": theta,
                # The file has it as a tensor; it is the same in all models of this family.
                "partial_rotary_factor": 0.25,
            },
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": fields.number("rope.freq_base_swa", 10000.0),
            },
        },
    }


GEMMA4 = Architecture(
    "Gemma4ForCausalLM",
    "gemma4_text",
    _config,
    {
        "attn_norm": "input_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
        "post_ffw_norm": "post_feedforward_layernorm",
        "post_ffw_norm_1": "post_feedforward_layernorm_1",
        "post_ffw_norm_2": "post_feedforward_layernorm_2",
        "layer_output_scale.weight": "layer_scalar",
        **ATTENTION,
        **HEAD_NORMS,
        **DENSE,
        "ffn_gate_inp": "router.proj",
        "ffn_gate_inp.scale": "router.scale",
        "ffn_gate_exps": "experts.{}.gate_proj",
        "ffn_up_exps": "experts.{}.up_proj",
        "ffn_down_exps": "experts.{}.down_proj",
        "ffn_down_exps.scale": "router.per_expert_scale",
    },
    unused=("rope_freqs.weight",),
)
