"""Small random checkpoints of real architectures, each from a seed.

    python tests/models/make.py qwen3_moe OUT

Weights are drawn wide enough (standard deviation 1/sqrt(inputs)) that every block changes the
result: with the usual 0.02, a layer that computes nothing would still pass a comparison.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import transformers

VOCABULARY = 384

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

# Latent attention with the head sizes that vLLM's CPU kernel is built for (DeepSeek's own).
MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}

# DeepSeek's own kind of position encoding. Plain RoPE on latent attention would hit a fault of vLLM
# 0.32's CPU operator, which takes queries of shape [tokens, heads, size] for a single head.
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}

DEEPSEEK: dict[str, Any] = {
    **MLA,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
}

GRANITE: dict[str, Any] = {
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "intermediate_size": 104,
    "embedding_multiplier": 2.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.8,
    "logits_scaling": 0.5,
}

# Fields that published checkpoints have in config.json. transformers does not write them, since its
# code implies their values.
UNWRITTEN = ("topk_method", "scoring_func")

# Fields of single families that transformers leaves out or writes with other values than published
# checkpoints have.
WRITTEN: dict[str, dict[str, Any]] = {
    "afmoe": {"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1},
    "glm4_moe_lite": {"first_k_dense_replace": 1},
    "kimi_k2": {"model_type": "kimi_k2"},
    "longcat_flash": {
        "zero_expert_type": "identity",
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
    },
    "minimax_m2": {"scoring_func": "sigmoid", "use_routing_bias": True},
    "phimoe": {"architectures": ["PhiMoEForCausalLM"]},
}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 80,
            "head_dim": 32,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 72,
            "shared_expert_intermediate_size": 96,
            "num_key_value_heads": 4,
        },
    ),
    "mixtral": ("MixtralConfig", {"num_local_experts": 6, "num_experts_per_tok": 2}),
    "olmoe": (
        "OlmoeConfig",
        {"num_experts": 8, "num_experts_per_tok": 4, "intermediate_size": 104},
    ),
    "deepseek_v2": (
        "DeepseekV2Config",
        {
            **DEEPSEEK,
            "topk_method": "group_limited_greedy",
            "scoring_func": "softmax",
            "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
            "routed_scaling_factor": 2.0,
            "norm_topk_prob": False,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **DEEPSEEK,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
            "routed_scaling_factor": 2.5,
            "norm_topk_prob": True,
        },
    ),
    "deepseek_v32": (
        "DeepseekV32Config",
        {
            **DEEPSEEK,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
            "routed_scaling_factor": 2.5,
            "norm_topk_prob": True,
            "index_n_heads": 4,
            "index_head_dim": 64,
            "index_topk": 128,
        },
    ),
    "kimi_k2": (
        "DeepseekV3Config",
        {
            **DEEPSEEK,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "n_group": 1,
            "topk_group": 1,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
            "routed_scaling_factor": 2.827,
            "norm_topk_prob": True,
        },
    ),
    "glm4_moe": (
        "Glm4MoeConfig",
        {
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_shared_experts": 1,
            "head_dim": 32,
            "moe_intermediate_size": 72,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "use_qk_norm": True,
            "routed_scaling_factor": 1.5,
        },
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        {
            "num_hidden_layers": 4,  # three layers of Gated DeltaNet, one of attention
            "head_dim": 32,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 80,
            "shared_expert_intermediate_size": 96,
            "norm_topk_prob": True,
        },
    ),
    "minimax_m2": (
        "MiniMaxM2Config",
        {
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "intermediate_size": 128,
            "head_dim": 32,
            "rotary_dim": 16,
        },
    ),
    "glm4_moe_lite": (
        "Glm4MoeLiteConfig",
        {
            **MLA,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_shared_experts": 1,
            "moe_intermediate_size": 72,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.8,
        },
    ),
    "phimoe": (
        "PhimoeConfig",
        {
            # The router's weights jump where two scores tie, and every layer may have such a tie.
            "num_hidden_layers": 2,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "router_jitter_noise": 0.01,
            "attention_bias": True,
            "lm_head_bias": True,
        },
    ),
    "gemma4": (
        "Gemma4TextConfig",
        {
            "num_hidden_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 16,
            "head_dim": 32,
            "global_head_dim": 64,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": True,
            "num_experts": 8,
            "top_k_experts": 3,
            "moe_intermediate_size": 72,
            "tie_word_embeddings": True,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        {
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "hidden_size": 160,
            "intermediate_size": 96,
            "head_dim": 32,
            "sliding_window": 16,
            "rope_parameters": {**YARN, "truncate": False},
        },
    ),
    "nemotron_h": (
        "NemotronHConfig",
        {
            "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
            "num_hidden_layers": 4,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_shared_experts": 1,
            "moe_intermediate_size": 72,
            "moe_shared_expert_intermediate_size": 96,
            "head_dim": 32,
            "ssm_state_size": 16,
            "mamba_num_heads": 8,
            "mamba_head_dim": 32,
            "n_groups": 2,
            "chunk_size": 32,
            "routed_scaling_factor": 2.5,
        },
    ),
    "afmoe": (
        "AfmoeConfig",
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "num_shared_experts": 1,
            "moe_intermediate_size": 72,
            "num_dense_layers": 1,
            "head_dim": 32,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "sliding_window": 16,
            "route_scale": 1.5,
            "mup_enabled": True,
        },
    ),
    "cohere2_moe": (
        "Cohere2MoeConfig",
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "num_shared_experts": 1,
            "head_dim": 32,
            "intermediate_size": 104,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "sliding_window": 128,  # vLLM's window has a token more than that of transformers
            "tie_word_embeddings": True,
            "logit_scale": 2.0,
        },
    ),
    "dots1": (
        "Dots1Config",
        {
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_shared_experts": 1,
            "moe_intermediate_size": 72,
            "first_k_dense_replace": 1,
            "head_dim": 32,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.5,
        },
    ),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        {
            "moe_num_experts": 8,
            "moe_k": 3,
            "moe_num_shared_experts": 1,
            "moe_intermediate_size": 72,
            "moe_layer_start_index": 1,
            "tie_word_embeddings": False,
        },
    ),
    "exaone_moe": (
        "ExaoneMoeConfig",
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "num_shared_experts": 1,
            "moe_intermediate_size": 72,
            "first_k_dense_replace": 1,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "sliding_window": 16,
        },
    ),
    "flex_olmo": (
        "FlexOlmoConfig",
        {"num_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 104},
    ),
    "granitemoe": ("GraniteMoeConfig", GRANITE),
    "granitemoeshared": ("GraniteMoeSharedConfig", GRANITE | {"shared_intermediate_size": 96}),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        {
            **GRANITE,
            "shared_intermediate_size": 96,
            "layer_types": ["mamba", "attention", "mamba"],
            "mamba_n_heads": 8,
            "mamba_d_head": 32,
            "mamba_d_state": 16,
            "mamba_chunk_size": 32,
        },
    ),
    "hunyuan_v1_moe": (
        "HunYuanMoEV1Config",
        {"num_experts": 8, "moe_topk": 3, "intermediate_size": 104, "head_dim": 32},
    ),
    "llama4": (
        "Llama4TextConfig",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size": 96,
            "intermediate_size_mlp": 192,
            "interleave_moe_layer_step": 1,
            "head_dim": 32,
            "attention_chunk_size": 128,
        },
    ),
    "longcat_flash": (
        "LongcatFlashConfig",
        {
            **MLA,
            "num_layers": 2,
            "num_hidden_layers": 4,  # each layer has attention twice
            "ffn_hidden_size": 192,
            "expert_ffn_hidden_size": 72,
            "n_routed_experts": 8,
            "zero_expert_num": 6,
            "moe_topk": 5,
            "routed_scaling_factor": 3.0,
        },
    ),
    "mellum": (
        "MellumConfig",
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 72,
            "head_dim": 32,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "sliding_window": 16,
        },
    ),
    "solar_open": (
        "SolarOpenConfig",
        {
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_shared_experts": 1,
            "moe_intermediate_size": 72,
            "head_dim": 32,
            "routed_scaling_factor": 1.5,
        },
    ),
}

TEXTS = {"qwen3_5_moe_text": ("Qwen3_5MoeTextConfig", ARCHITECTURES["qwen3_next"][1])}
"""The language models of models with pictures (`tests.models.vision`)."""


def make(architecture: str, folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Write a bfloat16 checkpoint of `architecture` to `folder`, with `changes` to its config."""
    config_class, fields = (ARCHITECTURES | TEXTS)[architecture]
    config = getattr(transformers, config_class)(**{**COMMON, **fields, **changes})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fill(model)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="512MB")
    _complete_config(folder / "config.json", architecture, fields)
    return folder


BIASES = ("e_score_correction_bias", "expert_bias")
"""What decides which experts a token takes, and not their weights."""


def fill(model: Any) -> None:
    """Draw every weight of `model` in place."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(BIASES):
                parameter.uniform_(0, 0.2)
            elif parameter.dim() >= 4:  # convolutions of a picture's patches
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            elif parameter.dim() >= 2 and "embed" not in name:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            elif "embed" in name or name.endswith(("sinks", "router.bias")):
                parameter.normal_()
            elif name.endswith("router.scale"):  # of Gemma 4; 1 makes all experts alike
                parameter.fill_(parameter.numel() ** 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith(BIASES):
                buffer.uniform_(0, 0.2)
    if model.config.tie_word_embeddings:
        # Tied embeddings must be smaller, or each token would be followed by itself. Without the
        # further half, Gemma 4's logits would be so wide that bfloat16 alone may reach the bound of
        # the tests (an error of 0.028 was seen).
        weight = model.get_input_embeddings().weight
        weight.data.mul_(0.5 * weight.shape[1] ** -0.5)


def _complete_config(path: Path, architecture: str, fields: dict[str, Any]) -> None:
    config = json.loads(path.read_text())
    config |= {name: fields[name] for name in UNWRITTEN if name in fields}
    config |= WRITTEN.get(architecture, {})
    path.write_text(json.dumps(config, indent=2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("architecture", choices=sorted(ARCHITECTURES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(make(arguments.architecture, arguments.folder, arguments.seed))
