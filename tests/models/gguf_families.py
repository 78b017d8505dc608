"""What tools that convert models write into GGUF files, for each family."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["FAMILIES", "Family", "longrope"]

Config = Mapping[str, Any]
Fields = dict[str, Any]
Arrays = dict[str, np.ndarray]

FIELDS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group",
}
"""ggml's names of sizes, and those of config.json."""
SCORING = {"softmax": 1, "sigmoid": 2}


def plain(config: Config) -> Fields:
    found = {name: config.get(theirs) for name, theirs in FIELDS.items()}
    if config.get("rope_type") == "yarn":
        found["rope.scaling.type"] = "yarn"
        found["rope.scaling.factor"] = config["factor"]
        length = config["original_max_position_embeddings"]
        found["rope.scaling.original_context_length"] = length
    if config.get("num_nextn_predict_layers"):
        drafting = config["num_nextn_predict_layers"]
        found["block_count"] = config["num_hidden_layers"] + drafting
        found["nextn_predict_layers"] = drafting
    return found


def longrope(original: int = 64) -> dict[str, Any]:
    """LongRoPE for heads of 32, as Phi-3.5-MoE has it. Float32 holds the factors."""
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": original,
        "short_factor": [1 + i / 16 for i in range(16)],
        "long_factor": [2 + i / 8 for i in range(16)],
        "short_mscale": 1.243163121016122,
        "long_mscale": 1.243163121016122,
    }


def as_it_is(config: Config, name: str, values: np.ndarray) -> Arrays:
    return {name: values}


@dataclass(frozen=True)
class Family:
    """A family, by what `model_type` of config.json names."""

    name: str
    """What ggml calls it."""
    fields: Callable[[Config], Fields] = plain
    """The fields, without the name of the architecture; those of None are left out."""
    split: Callable[[Config, str, np.ndarray], Arrays] = as_it_is
    """The tensors of the file that hold the values of one of the checkpoint. Every value is in them
    once. The names are such that the gguf package knows them."""
    compute: Callable[[str, np.ndarray], np.ndarray] | None = None
    """What the file has in the place of a tensor's values, by one of these names."""


def _deepseek(config: Config) -> Fields:
    latent, rotary = config["kv_lora_rank"], config["qk_rope_head_dim"]
    scale = config.get("mscale_all_dim")
    dense = config.get("first_k_dense_replace")
    return plain(config) | {
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": config["q_lora_rank"],
        "attention.kv_lora_rank": latent,
        "attention.key_length": latent + rotary,
        "attention.value_length": latent,
        "attention.key_length_mla": config["qk_nope_head_dim"] + rotary,
        "attention.value_length_mla": config["v_head_dim"],
        "rope.dimension_count": rotary,
        "rope.scaling.yarn_log_multiplier": None if scale is None else 0.1 * scale,
        "leading_dense_block_count": dense,
        "expert_shared_count": config["n_shared_experts"],
        "expert_weights_scale": config["routed_scaling_factor"],
        "expert_weights_norm": config["norm_topk_prob"],
        "expert_gating_func": SCORING.get(config.get("scoring_func", "")),
    }


def _old_deepseek(config: Config) -> Fields:
    """As files were until April 2025."""
    key = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
    return _deepseek(config) | {
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": key,
        "attention.value_length": config["v_head_dim"],
        "attention.key_length_mla": None,
        "attention.value_length_mla": None,
        "expert_gating_func": None,
    }


def _two_of_latent(config: Config, name: str, values: np.ndarray) -> Arrays:
    if not name.endswith("kv_b_proj.weight"):
        return {name: values}
    heads, key = config["num_attention_heads"], config["qk_nope_head_dim"]
    keys, of_values = np.split(values.reshape(heads, -1, values.shape[-1]), [key], 1)
    return {
        name.replace("kv_b", "k_b"): keys.swapaxes(1, 2),
        name.replace("kv_b", "v_b"): of_values,
    }


def _glm4(config: Config) -> Fields:
    return plain(config) | {
        "rope.dimension_count": int(config["head_dim"] * config["partial_rotary_factor"]),
        "leading_dense_block_count": config["first_k_dense_replace"],
        "expert_shared_count": config["n_shared_experts"],
        "expert_weights_scale": config["routed_scaling_factor"],
        "expert_weights_norm": config["norm_topk_prob"],
        "expert_gating_func": SCORING["sigmoid"],
    }


def _minimax(config: Config) -> Fields:
    return plain(config) | {
        "rope.dimension_count": config["rotary_dim"],
        "expert_feed_forward_length": config["intermediate_size"],
        "expert_gating_func": SCORING["sigmoid"],
    }


def _mixtral(config: Config) -> Fields:
    size = config["hidden_size"] // config["num_attention_heads"]
    return plain(config) | {"rope.dimension_count": size}


def _phi(config: Config) -> Fields:
    return plain(config) | {
        "attention.sliding_window": config.get("sliding_window") or 0,
        "rope.dimension_count": config["hidden_size"] // config["num_attention_heads"],
        "rope.scaling.original_context_length": config.get("original_max_position_embeddings"),
        "rope.scaling.attn_factor": 1.19,
    }


def _pairs(config: Config, name: str, values: np.ndarray) -> Arrays:
    """ggml rotates neighbours in a head of Llama, and transformers the halves of the head."""
    for part, key in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        if part in name:
            halves = values.reshape(config[key], 2, -1, *values.shape[1:])
            return {name: halves.swapaxes(1, 2).reshape(values.shape)}
    return {name: values}


def _gpt_oss(config: Config) -> Fields:
    return plain(config) | {
        "attention.sliding_window": config["sliding_window"],
        "expert_feed_forward_length": config["intermediate_size"],
    }


def _gate_and_up(config: Config, name: str, values: np.ndarray) -> Arrays:
    """All experts of gpt-oss are in one tensor, [experts, inputs, outputs]."""
    suffix = "bias" if name.endswith("_bias") else "weight"
    stem = name.removesuffix("_bias")
    if not stem.endswith(("gate_up_proj", "down_proj")):
        return {name.replace("sinks", "sinks.weight"): values}
    values = values if suffix == "bias" else values.swapaxes(1, 2)
    if stem.endswith("down_proj"):
        return {f"{stem}.{suffix}": values}
    return {
        f"{stem.replace('gate_up', part)}.{suffix}": values[:, first::2]
        for first, part in enumerate(("gate", "up"))
    }


def _gemma4(config: Config) -> Fields:
    slides = [kind == "sliding_attention" for kind in config["layer_types"]]
    full = config["per_layer_config"][str(slides.index(False))]
    return plain(config) | {
        "expert_used_count": config["top_k_experts"],
        "attention.head_count_kv": [
            config["num_key_value_heads"] if one else full["num_key_value_heads"] for one in slides
        ],
        "attention.key_length": full["head_dim"],
        "attention.value_length": full["head_dim"],
        "attention.key_length_swa": config["head_dim"],
        "attention.value_length_swa": config["head_dim"],
        "attention.sliding_window": config["sliding_window"],
        "attention.sliding_window_pattern": slides,
        "attention.shared_kv_layers": config["num_kv_shared_layers"],
        "embedding_length_per_layer_input": 0,
        "final_logit_softcapping": config["final_logit_softcapping"],
        "rope.freq_base": config["rope_parameters"]["full_attention"]["rope_theta"],
        "rope.freq_base_swa": config["rope_parameters"]["sliding_attention"]["rope_theta"],
        "rope.dimension_count": full["head_dim"],
        "rope.dimension_count_swa": config["head_dim"],
    }


def _scales(config: Config, name: str, values: np.ndarray) -> Arrays:
    if name.endswith(("_proj", "layer_scalar")):
        return {f"{name}.weight": values}
    name = name.replace("router.scale", "router.proj.scale")
    return {name.replace("router.per_expert_scale", "experts.down_proj.scale"): values}


def _nemotron(config: Config) -> Fields:
    attention = [kind == "full_attention" for kind in config["layers_block_type"]]
    heads = config["mamba_num_heads"]
    return plain(config) | {
        "block_count": len(attention),
        "feed_forward_length": [
            config["moe_intermediate_size"] if kind == "moe" else 0
            for kind in config["layers_block_type"]
        ],
        "attention.head_count_kv": [config["num_key_value_heads"] * one for one in attention],
        "attention.layer_norm_rms_epsilon": config["layer_norm_epsilon"],
        "ssm.conv_kernel": config["conv_kernel"],
        "ssm.state_size": config["ssm_state_size"],
        "ssm.group_count": config["n_groups"],
        "ssm.inner_size": heads * config["mamba_head_dim"],
        "ssm.time_step_rank": heads,
        "expert_shared_feed_forward_length": config["moe_shared_expert_intermediate_size"],
        "expert_shared_count": config["n_shared_experts"],
        "expert_weights_scale": config["routed_scaling_factor"],
        "expert_weights_norm": config["norm_topk_prob"],
    }


def _mixer(config: Config, name: str, values: np.ndarray) -> Arrays:
    if name.endswith(("A_log", ".D")):
        values = values.reshape(-1, 1)
    elif name.endswith("mixer.norm.weight"):
        values = values.reshape(config["n_groups"], -1)
    elif name.endswith("conv1d.weight"):
        values = values.squeeze(1)
    name = name.replace("dt_bias", "dt.bias")
    return {re.sub(r"backbone(.*)mixer\.experts", r"model\1mlp.experts", name): values}


def _linear(config: Config) -> Fields:
    values = config["linear_num_value_heads"]
    return plain(config) | {
        "rope.dimension_count": int(config["head_dim"] * config["partial_rotary_factor"]),
        "full_attention_interval": config["layer_types"].index("full_attention") + 1,
        "ssm.conv_kernel": config["linear_conv_kernel_dim"],
        "ssm.state_size": config["linear_key_head_dim"],
        "ssm.group_count": config["linear_num_key_heads"],
        "ssm.time_step_rank": values,
        "ssm.inner_size": config["linear_value_head_dim"] * values,
    }


def _decay(name: str, values: np.ndarray) -> np.ndarray:
    return -np.exp(values) if name.endswith("A_log") else values


def _decay_and_norms(name: str, values: np.ndarray) -> np.ndarray:
    if name.endswith("norm.weight") and "linear_attn" not in name:
        return values + 1
    return _decay(name, values)


def _qwen3_next(config: Config, name: str, values: np.ndarray) -> Arrays:
    name = name.replace("dt_bias", "dt_proj.bias")
    if "in_proj_qkvz" not in name:
        return {name: values.squeeze(1) if "conv1d" in name else values}
    count, key = config["linear_num_key_heads"], config["linear_key_head_dim"]
    of_values = config["linear_num_value_heads"] // count * config["linear_value_head_dim"]
    groups = values.reshape(count, -1, values.shape[-1])
    parts = np.split(groups, [key, 2 * key, 2 * key + of_values], 1)
    *qkv, gates = (part.reshape(-1, values.shape[-1]) for part in parts)
    return {
        name.replace("qkvz", "qkv"): np.concatenate(qkv),
        name.replace("qkvz", "z"): gates,
    }


def _qwen3_5(config: Config, name: str, values: np.ndarray) -> Arrays:
    """The heads of values are those of the first place of each key, then those of the second."""
    count, heads = config["linear_num_key_heads"], config["linear_num_value_heads"]
    before = 2 * count * config["linear_key_head_dim"]

    def tiled(rows: np.ndarray) -> np.ndarray:
        grouped = rows.reshape(count, heads // count, -1, *rows.shape[1:])
        return grouped.swapaxes(0, 1).reshape(rows.shape)

    part = name.partition("linear_attn.")[2].partition(".")[0]
    if part in ("in_proj_qkv", "conv1d"):
        values = np.concatenate((values[:before], tiled(values[before:])))
    elif part in ("in_proj_z", "in_proj_a", "in_proj_b", "A_log", "dt_bias"):
        values = tiled(values)
    elif part == "out_proj":
        values = tiled(values.T).T
    return {
        name.replace("dt_bias", "dt_proj.bias"): values.squeeze(1) if part == "conv1d" else values
    }


FAMILIES = {
    "qwen3_moe": Family("qwen3moe"),
    "qwen2_moe": Family("qwen2moe"),
    "qwen3_next": Family("qwen3next", _linear, _qwen3_next, _decay_and_norms),
    "qwen3_5_moe_text": Family("qwen35moe", _linear, _qwen3_5, _decay_and_norms),
    "nemotron_h": Family("nemotron_h_moe", _nemotron, _mixer, _decay),
    "olmoe": Family("olmoe"),
    "deepseek_v2": Family("deepseek2", _old_deepseek),
    "deepseek_v3": Family("deepseek2", _deepseek, _two_of_latent),
    "glm4_moe_lite": Family("deepseek2", _deepseek, _two_of_latent),
    "glm4_moe": Family("glm4moe", _glm4),
    "gemma4_text": Family("gemma4", _gemma4, _scales),
    "gpt_oss": Family("gpt-oss", _gpt_oss, _gate_and_up),
    "minimax_m2": Family("minimax-m2", _minimax),
    "phimoe": Family("phimoe", _phi),
    "mixtral": Family("llama", _mixtral, _pairs),
}
