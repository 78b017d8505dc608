"""gpt-oss, whose model has gate and up in one tensor, a row of each in turn."""

from collections.abc import Sequence
from typing import Any

import torch

from lvllm.checkpoint.gguf.architecture import Architecture, Change
from lvllm.checkpoint.gguf.families.common import ATTENTION, basics, experts, heads
from lvllm.checkpoint.gguf.fields import Fields

__all__ = ["GPT_OSS"]


def _config(fields: Fields) -> dict[str, Any]:
    found = basics(fields)
    scaling = found.get("rope_scaling", {})
    if scaling.get("rope_type") != "yarn":
        raise fields.refuse("rope.scaling.type", scaling.get("rope_type", "none"), "yarn is wanted")
    kinds = ("sliding_attention", "full_attention")
    return {
        **found,
        **heads(fields),
        **experts(fields, "num_local_experts"),
        # The file does not say so; this holds for all models of this family.
        "rope_scaling": scaling | {"truncate": False},
        "layer_types": [kinds[layer % 2] for layer in range(fields.layers)],
        "attention_bias": True,
        "swiglu_limit": 7.0,
        "intermediate_size": fields.whole("expert_feed_forward_length", 1, 1 << 20),
        "sliding_window": fields.whole("attention.sliding_window", 1, 1 << 30),
    }


def _alternate(fields: Fields, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows [rows, columns] of an expert's gate and up."""
    return torch.stack(tuple(parts), 1).flatten(0, 1)


def _alternate_biases(fields: Fields, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Biases [experts, rows] of gate and up."""
    return torch.stack(tuple(parts), 2).flatten(1, 2)


def _same(fields: Fields, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0]


GPT_OSS = Architecture(
    "GptOssForCausalLM",
    "gpt_oss",
    _config,
    {
        "attn_norm": "input_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        **ATTENTION,
        "attn_sinks.weight": "self_attn.sinks",
        "ffn_gate_inp": "mlp.router",
        "ffn_gate_exps": "mlp.experts.{}.gate_proj",
        "ffn_up_exps": "mlp.experts.{}.up_proj",
        "ffn_down_exps": "mlp.experts.{}.down_proj",
        "ffn_gate_exps.bias": "mlp.experts.gate_proj_bias",
        "ffn_up_exps.bias": "mlp.experts.up_proj_bias",
        "ffn_down_exps.bias": "mlp.experts.down_proj_bias",
    },
    {
        # vLLM's model takes single experts under the names of its parameters.
        "mlp.experts.{}.w13_weight": Change(
            ("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight"), _alternate
        ),
        "mlp.experts.{}.w2_weight": Change(("mlp.experts.{}.down_proj.weight",), _same),
        "mlp.experts.gate_up_proj_bias": Change(
            ("mlp.experts.gate_proj_bias", "mlp.experts.up_proj_bias"), _alternate_biases
        ),
    },
)
