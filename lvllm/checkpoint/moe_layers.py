"""Which decoder layers of a model have routed experts, read from its `config.json`."""

import re
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lvllm.checkpoint.headers import CheckpointError
from lvllm.errors import quoted

__all__ = ["MOST_LAYERS", "decoder_layers", "layer_number", "moe_layers"]

MOST_LAYERS = 512
"""No model has as many. transformers builds 100 layers in a second, so 2**40 have no end."""
_LAYER = re.compile(r"(?:^|\.)layers\.(\d{1,9})(?:\.|$)")


def layer_number(name: str) -> int | None:
    """The number of the decoder layer that a module or tensor of this name belongs to.

    The name may have any prefix: `language_model.model.layers.3.mlp`, `backbone.layers.3.mixer`.
    The result is None for a module or tensor outside the decoder layers.
    """
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def decoder_layers(text_config: Any) -> int | None:
    """How many decoder layers a language model's configuration says that it has; None: it does not.

    A layer of LongCat-Flash has attention twice, and its `num_hidden_layers` counts both.
    """
    twice = getattr(text_config, "model_type", None) == "longcat_flash"
    return getattr(text_config, "num_layers" if twice else "num_hidden_layers", None)


def moe_layers(text_config: Any) -> list[int]:
    """Indices of the decoder layers with routed experts, in the model's own numbering.

    `text_config` is the language model's Hugging Face configuration. Model families use different
    fields to say which layers are dense. A field that a configuration lacks, or that is None,
    excludes no layer.

    Raises CheckpointError for a field with a value that means nothing.
    """
    try:
        fields = _Fields.model_validate(text_config)
    except ValidationError as error:
        first = error.errors()[0]
        raise _refuse(first["loc"][0], first["input"], first["msg"]) from None
    layers = decoder_layers(text_config) or 0
    for name in ("mlp_layer_types", "hybrid_override_pattern", "moe_layer_freq"):
        value = getattr(fields, name)
        if isinstance(value, list | str) and len(value) < layers:
            raise _refuse(name, value, f"one entry for each of {layers} layers is wanted")
    return [layer for layer in range(layers) if fields.have_experts(layer)]


_Layer = Annotated[int, Field(ge=0)]
_Every = Annotated[int, Field(ge=1)]
_Listed = Annotated[str, Field(pattern=r"^\s*\d{1,9}\s*(,\s*\d{1,9}\s*)*$")]


class _Fields(BaseModel):
    """The fields of a configuration that say which layers have experts."""

    model_config = ConfigDict(from_attributes=True)

    num_hidden_layers: Annotated[int, Field(ge=0, le=MOST_LAYERS)]
    # These have one entry for each layer. The first one is of GLM, EXAONE and Laguna, the second
    # one of Nemotron-H, the third one of MiMo.
    mlp_layer_types: list[str] | None = None
    hybrid_override_pattern: str | list[str] | None = None
    moe_layer_freq: list[int] | _Every | None = None
    # These list the layers with experts. The first one is of Step-3, the second of Llama 4.
    moe_layers_enum: _Listed | None = None
    moe_layers: list[int] | None = None
    # DeepSeek, GLM-4 and Kimi use the first name, AFMoE and LFM2 the second one.
    first_k_dense_replace: _Layer | None = None
    num_dense_layers: _Layer | None = None
    # Qwen uses these two.
    mlp_only_layers: list[int] | None = None
    decoder_sparse_step: _Every | None = None
    # ERNIE uses these two.
    moe_layer_start_index: _Layer | None = None
    moe_layer_interval: _Every | None = None

    def have_experts(self, layer: int) -> bool:
        if self.mlp_layer_types:
            return self.mlp_layer_types[layer] == "sparse"
        if self.hybrid_override_pattern:
            return self.hybrid_override_pattern[layer] == "E"
        if isinstance(self.moe_layer_freq, list):
            return bool(self.moe_layer_freq[layer])
        if self.moe_layers_enum is not None:
            return layer in map(int, self.moe_layers_enum.split(","))
        if self.moe_layers is not None:
            return layer in self.moe_layers
        return (
            layer >= (self.first_k_dense_replace or 0)
            and layer >= (self.num_dense_layers or 0)
            and layer % (self.moe_layer_freq or 1) == 0
            and layer not in (self.mlp_only_layers or ())
            and (layer + 1) % (self.decoder_sparse_step or 1) == 0
            and layer >= (self.moe_layer_start_index or 0)
            and (layer + 1) % (self.moe_layer_interval or 1) == 0
        )


def _refuse(field: object, value: object, wanted: str) -> CheckpointError:
    return CheckpointError(f"config.json: {field} is {quoted(value)}: {wanted}")
