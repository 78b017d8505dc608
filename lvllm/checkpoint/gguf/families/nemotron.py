"""Nemotron 3: each layer is a Mamba, attention, or experts, which have no gate."""

from collections.abc import Sequence
from typing import Any

import torch

from lvllm.checkpoint.gguf.architecture import OUTSIDE, Architecture, Change
from lvllm.checkpoint.gguf.families.common import basics, experts
from lvllm.checkpoint.gguf.fields import Fields

__all__ = ["NEMOTRON"]

KINDS = {"ssm_in": "M", "attn_q": "*", "ffn_gate_inp": "E"}
"""A tensor that only one kind of layer has, and that kind in `hybrid_override_pattern`."""


def _config(fields: Fields) -> dict[str, Any]:
    found, of_model = basics(fields), experts(fields, "n_routed_experts")
    groups = fields.whole("expert_group_count", 1, of_model["n_routed_experts"], 1)
    heads = fields.whole("ssm.time_step_rank", 1, 1 << 12)
    tensors = fields.header.tensors
    key_heads = fields.for_layers("attention.head_count_kv")
    return {
        **{key: found[key] for key in found if key not in ("hidden_act", "rms_norm_eps")},
        **of_model,
        "layer_norm_epsilon": found["rms_norm_eps"],
        "hybrid_override_pattern": "".join(_kind(fields, i) for i in range(fields.layers)),
        "head_dim": fields.whole("attention.key_length", 1, 1 << 16),
        "num_key_value_heads": max(key_heads),
        "attention_bias": any(name.endswith(".attn_q.bias") for name in tensors),
        "mlp_hidden_act": "relu2",
        "mamba_num_heads": heads,
        "mamba_head_dim": fields.whole("ssm.inner_size", heads, 1 << 20) // heads,
        "n_groups": fields.whole("ssm.group_count", 1, heads),
        "ssm_state_size": fields.whole("ssm.state_size", 1, 1 << 16),
        "conv_kernel": fields.whole("ssm.conv_kernel", 1, 1 << 10),
        "use_conv_bias": any(name.endswith(".ssm_conv1d.bias") for name in tensors),
        "moe_intermediate_size": fields.whole("expert_feed_forward_length", 1, 1 << 20),
        "moe_shared_expert_intermediate_size": fields.whole(
            "expert_shared_feed_forward_length", 1, 1 << 20
        ),
        "moe_latent_size": fields.whole("moe_latent_size", 1, 1 << 18)
        if fields.has("moe_latent_size")
        else None,
        "n_shared_experts": fields.whole("expert_shared_count", 0, 1 << 10, 1),
        "n_group": groups,
        "topk_group": fields.whole("expert_group_used_count", 1, groups, groups),
        "norm_topk_prob": fields.flag("expert_weights_norm", True),
        "routed_scaling_factor": fields.number("expert_weights_scale", 1.0),
        "num_nextn_predict_layers": 0,
    }


def _kind(fields: Fields, layer: int) -> str:
    for name, kind in KINDS.items():
        if f"blk.{layer}.{name}.weight" in fields.header.tensors:
            return kind
    return "-"


def _decay(fields: Fields, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return (-parts[0]).log().flatten()


def _flat(fields: Fields, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0].flatten()


def _one_channel(fields: Fields, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0].unsqueeze(1)


NEMOTRON = Architecture(
    "NemotronHForCausalLM",
    "nemotron_h",
    _config,
    {
        "attn_norm": "norm",
        "attn_q": "mixer.q_proj",
        "attn_k": "mixer.k_proj",
        "attn_v": "mixer.v_proj",
        "attn_output": "mixer.o_proj",
        "ssm_in": "mixer.in_proj",
        "ssm_conv1d": "mixer.conv1d",
        "ssm_dt.bias": "mixer.dt_bias",
        "ssm_a": "mixer.A_log",
        "ssm_d": "mixer.D",
        "ssm_norm": "mixer.norm",
        "ssm_out": "mixer.out_proj",
        "ffn_up": "mixer.up_proj",
        "ffn_down": "mixer.down_proj",
        "ffn_gate_inp": "mixer.gate",
        "exp_probs_b.bias": "mixer.gate.e_score_correction_bias",
        "ffn_up_exps": "mixer.experts.{}.up_proj",
        "ffn_down_exps": "mixer.experts.{}.down_proj",
        "ffn_up_shexp": "mixer.shared_experts.up_proj",
        "ffn_down_shexp": "mixer.shared_experts.down_proj",
        "ffn_latent_down": "mixer.fc1_latent_proj",
        "ffn_latent_up": "mixer.fc2_latent_proj",
    },
    {
        "mixer.A_log": Change(("mixer.A_log",), _decay),
        "mixer.D": Change(("mixer.D",), _flat),
        "mixer.norm.weight": Change(("mixer.norm.weight",), _flat),
        "mixer.conv1d.weight": Change(("mixer.conv1d.weight",), _one_channel),
    },
    outside={**OUTSIDE, "output_norm": "model.norm_f"},
    gated=False,
)
