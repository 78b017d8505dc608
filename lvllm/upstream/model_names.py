"""Names in config.json that the installed vLLM and transformers do not know.

vLLM's own errors about them are lines of pydantic, with lists of all that it knows. They are
explained once they have happened: what vLLM takes is never refused here.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
import vllm
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
from vllm.model_executor.models import ModelRegistry
from vllm.transformers_utils import config as vllms

from lvllm import formats
from lvllm.checkpoint.model_files import CONFIG, SECTIONS, config_of
from lvllm.errors import quoted
from lvllm.formats.descriptor import union

__all__ = ["explain"]

NOBODY = f"neither vLLM {vllm.__version__} nor transformers {transformers.__version__} knows"
_TYPE_OF_ARCHITECTURE = getattr(vllms, "_ARCHITECTURE_TO_MODEL_TYPE", {})
_READ = union(module.DESCRIPTOR.quant_methods for module in formats.FORMATS)


def explain(folder: Path, overrides: Any, said: str) -> str | None:
    """The line for an error of vLLM that a name in `folder` caused; None if no name did.

    Args:
        folder: where config.json is, which has been read before.
        overrides: vLLM's hf_overrides.
        said: the error's text.
    """
    file = folder / CONFIG
    if not file.is_file() or callable(overrides):
        return None
    config = config_of(folder) | (overrides or {})
    if (why := _model(config) or _quantization(config, said)) is None:
        return None
    return f"{file}: {why}"


def _model(config: Mapping[str, Any]) -> str | None:
    if "auto_map" in config or "speculators_config" in config:
        return None  # The model brings its own code, or is described in another file.
    kind, architectures = config.get("model_type"), config.get("architectures") or []
    if kind is None:
        # vLLM knows some models that have no type by their class.
        if any(name in _TYPE_OF_ARCHITECTURE for name in architectures):
            return None
        return 'has no model_type: the type of a model is wanted, such as "qwen3_moe"'
    if kind not in CONFIG_MAPPING and kind not in vllms._CONFIG_REGISTRY:
        return f"model_type={quoted(kind)} is not allowed: {NOBODY} models of this type"
    if not architectures:
        # transformers names the class of a type that it knows.
        if kind in MODEL_MAPPING_NAMES:
            return None
        return (
            "has no architectures: a list with the name of the model's class is wanted, such as"
            ' ["Qwen3MoeForCausalLM"]'
        )
    known = ModelRegistry.get_supported_archs()
    if any(name in known or hasattr(transformers, name) for name in architectures):
        return None
    return f"architectures={quoted(architectures)} is not allowed: {NOBODY} such a model"


def _quantization(config: Mapping[str, Any], said: str) -> str | None:
    places = (("", config), ("text_config.", config.get("text_config") or {}))
    found = [(at + key, part[key]) for at, part in places for key in SECTIONS if part.get(key)]
    if not found or "quant" not in said.lower():
        return None
    name, section = found[0]
    method = section.get("quant_method")
    if method is not None and method.lower() not in (*QUANTIZATION_METHODS, *_READ):
        return (
            f"{name}.quant_method={quoted(method)} is not allowed: neither vLLM"
            f" {vllm.__version__} nor LvLLM knows such a format; LvLLM reads {', '.join(_READ)}"
        )
    return f"{name}: {' '.join(said.split())[:300]}"
