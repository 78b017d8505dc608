"""The sizes of published models, as their config.json files give them."""

from dataclasses import dataclass
from functools import cache
from typing import Any

from lvllm.planning import shape
from lvllm.planning.shape import ModelShape

__all__ = ["MODELS", "Published", "shape_of"]

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
MXFP4 = {"quant_method": "mxfp4"}


@dataclass(frozen=True)
class Published:
    """A model on the hub."""

    name: str
    weights: float
    """Billion weights that its makers name, without layers that draft later tokens."""
    config: dict[str, Any]


def _qwen3(**sizes: int) -> dict[str, Any]:
    fixed = {"head_dim": 128, "vocab_size": 151936, "num_experts_per_tok": 8}
    more = {"tie_word_embeddings": False, "max_position_embeddings": 40960}
    return {"model_type": "qwen3_moe", **fixed, **more, **sizes}


def _glm4(**sizes: int) -> dict[str, Any]:
    fixed = {"num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128}
    more = {"vocab_size": 151552, "num_experts_per_tok": 8, "attention_bias": True}
    ends = {"tie_word_embeddings": False, "max_position_embeddings": 131072}
    return {"model_type": "glm4_moe", "n_shared_experts": 1, **fixed, **more, **ends, **sizes}


_DEEPSEEK: dict[str, Any] = {"model_type": "deepseek_v3", "max_position_embeddings": 163840}

MODELS = [
    Published(
        "Qwen3-30B-A3B",
        30.5,
        _qwen3(
            hidden_size=2048,
            num_hidden_layers=48,
            num_attention_heads=32,
            num_key_value_heads=4,
            num_experts=128,
            moe_intermediate_size=768,
        ),
    ),
    Published(
        "Qwen3-Next-80B-A3B",
        79.7,
        {"model_type": "qwen3_next", "max_position_embeddings": 262144},
    ),
    Published(
        "GLM-4.5-Air-FP8",
        106.9,
        _glm4(
            hidden_size=4096,
            num_hidden_layers=46,
            n_routed_experts=128,
            moe_intermediate_size=1408,
            intermediate_size=10944,
            first_k_dense_replace=1,
        )
        | {"quantization_config": FP8},
    ),
    Published("gpt-oss-120b", 116.8, {"model_type": "gpt_oss", "quantization_config": MXFP4}),
    Published(
        "Mixtral-8x22B",
        140.6,
        {
            "model_type": "mixtral",
            "hidden_size": 6144,
            "num_hidden_layers": 56,
            "num_attention_heads": 48,
            "num_key_value_heads": 8,
            "intermediate_size": 16384,
            "vocab_size": 32768,
            "max_position_embeddings": 65536,
        },
    ),
    Published(
        "MiniMax-M2",
        228.7,
        {
            "model_type": "minimax_m2",
            "max_position_embeddings": 196608,
            "quantization_config": FP8,
        },
    ),
    Published(
        "Qwen3-235B-A22B-FP8",
        235.1,
        _qwen3(
            hidden_size=4096,
            num_hidden_layers=94,
            num_attention_heads=64,
            num_key_value_heads=4,
            num_experts=128,
            moe_intermediate_size=1536,
        )
        | {"quantization_config": FP8},
    ),
    Published(
        "GLM-4.5-FP8",
        352.8,
        _glm4(
            hidden_size=5120,
            num_hidden_layers=92,
            n_routed_experts=160,
            moe_intermediate_size=1536,
            intermediate_size=12288,
            first_k_dense_replace=3,
        )
        | {"quantization_config": FP8},
    ),
    Published(
        "Qwen3-Coder-480B-A35B-FP8",
        480.2,
        _qwen3(
            hidden_size=6144,
            num_hidden_layers=62,
            num_attention_heads=96,
            num_key_value_heads=8,
            num_experts=160,
            moe_intermediate_size=2560,
        )
        | {"quantization_config": FP8, "max_position_embeddings": 262144},
    ),
    Published("DeepSeek-R1", 671.0, _DEEPSEEK | {"quantization_config": FP8}),
    Published("DeepSeek-V3-AWQ", 671.0, _DEEPSEEK | {"quantization_config": AWQ}),
    Published(
        "Kimi-K2",
        1026.4,
        {
            "model_type": "kimi_k2",
            "hidden_size": 7168,
            "num_hidden_layers": 61,
            "num_attention_heads": 64,
            "num_key_value_heads": 64,
            "n_routed_experts": 384,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "vocab_size": 163840,
            "max_position_embeddings": 131072,
            "quantization_config": FP8,
        },
    ),
]


@cache  # transformers takes half a second for each
def shape_of(name: str) -> ModelShape:
    """The shape of one of MODELS."""
    config = next(model.config for model in MODELS if model.name == name)
    return shape.of_config(config, name)
