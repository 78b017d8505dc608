"""Which decoder layers of a model have routed experts, read from its `config.json`."""

import re
from typing import Any

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)(?:\.|$)")


def layer_number(name: str) -> int | None:
    """The number of the decoder layer that a module or tensor of this name belongs to.

    The name may have any prefix: `language_model.model.layers.3.mlp`, `backbone.layers.3.mixer`.
    The result is None for a module or tensor outside the decoder layers.
    """
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def moe_layers(text_config: Any) -> list[int]:
    """Indices of the decoder layers with routed experts, in the model's own numbering.

    `text_config` is the language model's Hugging Face configuration. Model families use different
    fields to say which layers are dense. A field that a configuration lacks excludes no layer.
    """
    layers = int(text_config.num_hidden_layers)
    return [layer for layer in range(layers) if _has_experts(text_config, layer)]


def _has_experts(config: Any, layer: int) -> bool:
    def field(name: str, default: Any) -> Any:
        value = getattr(config, name, None)
        return default if value is None else value

    # These fields have one entry for each layer. The first one is of GLM, EXAONE and Laguna, the
    # second one of Nemotron-H, the third one of MiMo.
    if types := field("mlp_layer_types", None):
        return types[layer] == "sparse"
    if pattern := field("hybrid_override_pattern", None):
        return pattern[layer] == "E"
    frequency = field("moe_layer_freq", 1)
    if isinstance(frequency, list):
        return bool(frequency[layer])
    # These fields list the layers with experts. The first one is of Step-3, the second of Llama 4.
    if (listed := field("moe_layers_enum", None)) is not None:
        return layer in {int(index) for index in listed.split(",")}
    if (listed := field("moe_layers", None)) is not None:
        return layer in listed
    return (
        # DeepSeek, GLM-4 and Kimi use the first name, AFMoE and LFM2 the second one.
        layer >= field("first_k_dense_replace", 0)
        and layer >= field("num_dense_layers", 0)
        and layer % frequency == 0
        # Qwen uses these two.
        and layer not in field("mlp_only_layers", ())
        and (layer + 1) % field("decoder_sparse_step", 1) == 0
        # ERNIE uses these two.
        and layer >= field("moe_layer_start_index", 0)
        and (layer + 1) % field("moe_layer_interval", 1) == 0
    )
