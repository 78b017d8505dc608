"""GLM-4.5, GLM-4.6 and GLM-4.5-Air."""

from typing import Any

from lvllm.checkpoint.gguf.architecture import Architecture
from lvllm.checkpoint.gguf.families.common import (
    ATTENTION,
    DENSE,
    HEAD_NORMS,
    ROUTED,
    SHARED,
    basics,
    experts,
    heads,
)
from lvllm.checkpoint.gguf.fields import Fields

__all__ = ["GLM4"]


def _config(fields: Fields) -> dict[str, Any]:
    if (sections := fields.get("rope.dimension_sections")) is not None:
        wanted = "models with pictures are not served"
        raise fields.refuse("rope.dimension_sections", sections, wanted)
    fields.whole("expert_gating_func", 2, 2, 2)  # sigmoid
    of_heads = heads(fields, partial=True)
    tensors = fields.header.tensors
    return {
        **basics(fields),
        **of_heads,
        **experts(fields, "n_routed_experts"),
        "partial_rotary_factor": fields.rotary(of_heads["head_dim"]),
        "intermediate_size": fields.whole("feed_forward_length", 1, 1 << 20),
        "moe_intermediate_size": fields.whole("expert_feed_forward_length", 1, 1 << 20),
        "n_shared_experts": fields.whole("expert_shared_count", 1, 1 << 10, 1),
        "first_k_dense_replace": fields.dense_layers,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": fields.flag("expert_weights_norm", True),
        "routed_scaling_factor": fields.number("expert_weights_scale", 1.0),
        "use_qk_norm": "blk.0.attn_q_norm.weight" in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "num_nextn_predict_layers": 0,
    }


GLM4 = Architecture(
    "Glm4MoeForCausalLM",
    "glm4_moe",
    _config,
    {
        "attn_norm": "input_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        **ATTENTION,
        **HEAD_NORMS,
        **DENSE,
        **ROUTED,
        **SHARED,
    },
)
