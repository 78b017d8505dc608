"""A model's config.json, as LvLLM plans with it and looks for the layers with experts.

The first byte says what the rest is: the text of the file, or changes of a small model's.
"""

import copy
import json
from types import SimpleNamespace
from typing import Any

from lvllm import formats
from lvllm.checkpoint.moe_layers import moe_layers
from lvllm.planning import shape
from tests.fuzz.choices import Choices
from tests.fuzz.planned import plan
from tests.fuzz.rules import ask
from tests.fuzz.scratch import scratch_folder

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 99,
    "num_experts_per_tok": 2,
}
LATENT = {
    "n_routed_experts": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
MODELS: tuple[dict[str, Any], ...] = (
    {"model_type": "qwen3_moe", "num_experts": 4, "decoder_sparse_step": 1, "mlp_only_layers": []},
    {"model_type": "mixtral", "num_local_experts": 4, "sliding_window": 16},
    {"model_type": "deepseek_v3", **LATENT},
    {
        "model_type": "gpt_oss",
        "num_local_experts": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    {"model_type": "glm4_moe", "n_routed_experts": 4, "first_k_dense_replace": 1},
)
SECTIONS: tuple[dict[str, Any], ...] = (
    {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]},
    {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True},
    {"quant_method": "gptq", "bits": 4, "group_size": 64, "dynamic": {"-:.*attn.*": {}}},
    {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": ["re:.*gate$", "lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "int", "group_size": 32, "strategy": "group"},
            }
        },
    },
    {
        "quant_method": "modelopt",
        "quantization": {"quant_algo": "NVFP4", "exclude_modules": ["lm_head"]},
    },
    {"quant_method": "auto-round", "bits": 4, "extra_config": {"lm_head": {"bits": 16}}},
    {"quant_method": "mxfp4"},
)
OTHER_KEYS = (
    "moe_layer_freq",
    "mlp_layer_types",
    "hybrid_override_pattern",
    "moe_layers_enum",
    "moe_layers",
    "moe_layer_interval",
    "layer_types",
    "sliding_window",
    "max_position_embeddings",
    "tie_word_embeddings",
    "rope_scaling",
    "text_config",
    "quantization_config",
)
VALUES: tuple[Any, ...] = (
    None,
    *(0, 1, 2, 3, 7, -1, 255, 1 << 15, 100_000, 1 << 31, 1 << 40, 1 << 63, 10**30),
    *(True, False, 0.5, float("nan"), float("inf")),
    *("", "x", "2", "E", "sparse", "1,2", "a\nb", "re:(.+)+!", "re:(", "x" * 5000, "\udc80"),
    *([], [0], [1, 2], ["x"], ["re:("], ["re:(.*.*)*!"], [None], [[]], ["sparse", "dense"]),
    *({}, {"x": 1}, {"a": {}}, {"lm_head": None}, {"bits": 3}, {"re:(": {"bits": 4}}),
)


# transformers imports the code of a family when it is first asked for, which takes seconds.
for model in MODELS:
    shape.of_config(SIZES | model, "model")


def one_input(data: bytes) -> None:
    if data[:1] == b"t":
        with scratch_folder() as folder:
            (folder / "config.json").write_bytes(data[1:])
            config = ask(shape.read_config, folder)
    else:
        config = _changed(Choices(data))
    if config is None:
        return
    if (model := ask(shape.of_config, config, "model")) is not None:
        ask(plan, model)
    if isinstance(config.get("num_hidden_layers"), int):
        ask(moe_layers, SimpleNamespace(**{str(key): value for key, value in config.items()}))
    if isinstance(section := config.get("quantization_config"), dict):
        ask(formats.only_4_bit, section, range(2))


def _changed(choices: Choices) -> dict[str, Any]:
    """A small model's configuration with some values replaced."""
    config = SIZES | choices.of(MODELS)
    if choices.flag():
        config["quantization_config"] = choices.of(SECTIONS)
    config = json.loads(json.dumps(config))
    while not choices.over:
        place = config
        keys: tuple[str, ...] = (*config, *OTHER_KEYS)
        key = choices.of(keys)
        # A value within the section is replaced as often as the section itself.
        while isinstance(place.get(key), dict) and place[key] and choices.flag():
            place = place[key]
            key = choices.of(tuple(place))
        if (value := choices.of((*VALUES, "left out"))) == "left out":
            place.pop(key, None)
        else:
            place[key] = copy.deepcopy(value)
    return config
