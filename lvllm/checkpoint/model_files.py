"""The small files of a model beside its weights: config.json, the tokenizer's, chat templates.

vLLM and transformers read them. Where one is damaged, they end in a traceback that does not name
it, or go on as if it were not there. So these files are looked at before: whether each can be read
and is what its name says, whether the sizes in config.json are numbers, and whether a chat template
can be used.
"""

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from lvllm.checkpoint.files import open_regular
from lvllm.checkpoint.headers import CheckpointError
from lvllm.errors import quoted

__all__ = ["CONFIG", "GENERATION", "TOKENIZER", "check", "config_of", "template_fault"]

CONFIG = "config.json"
TEMPLATE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION = ("generation_config.json",)
TOKENIZER = (
    "tokenizer.json",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    TEMPLATE,
)
MOST_BYTES = 1 << 28
"""A tokenizer.json of 256k tokens takes an eighth of it."""
SECTIONS = ("quantization_config", "compression_config")
"""Where a config.json says how weights are quantised; the second is a former name of the first."""

# The least and the most number of each, and whether it may be null. Models without experts may say
# 0 or null, and those with a text_config have null beside it. No model comes near the most.
SIZES = {
    "hidden_size": (1, 1 << 18, False),
    "num_hidden_layers": (1, 1 << 12, False),
    "num_attention_heads": (1, 1 << 12, True),
    "num_key_value_heads": (1, 1 << 12, True),
    "head_dim": (1, 1 << 16, True),
    "moe_intermediate_size": (0, 1 << 20, True),
    "num_experts": (0, 1 << 16, True),
    "num_local_experts": (0, 1 << 16, True),
    "n_routed_experts": (0, 1 << 16, True),
    "moe_num_experts": (0, 1 << 16, True),
    "num_experts_per_tok": (0, 1 << 16, True),
    "num_experts_per_token": (0, 1 << 16, True),
    "top_k_experts": (0, 1 << 16, True),
    "moe_top_k": (0, 1 << 16, True),
    "moe_k": (0, 1 << 16, True),
    "moe_topk": (0, 1 << 16, True),
}
KINDS: dict[str, tuple[type, str]] = {
    "architectures": (list, "a list of names"),
    "model_type": (str, "a name"),
    **dict.fromkeys(SECTIONS, (dict, "an object")),
}


def check(folder: Path, names: Collection[str], overridden: Collection[str] = ()) -> None:
    """Raise CheckpointError if one of the files in `folder` called `names` is damaged.

    A file that is not there is not missed. `overridden` are keys of config.json whose values do
    not matter.
    """
    for name in names:
        file = folder / name
        text = _text(file)
        if text is None:
            continue
        if file.suffix != ".json":
            _check_template(file, "", text)
            continue
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{file}: is no JSON: {error}") from None
        if not isinstance(values, dict):
            raise CheckpointError(f"{file}: is no JSON object, but {quoted(values)}")
        if name == CONFIG:
            _check_config(file, values, overridden)
        elif values.get("chat_template") is not None and (
            # Beside a file with a template, transformers does not use the one of the tokenizer.
            name != TOKENIZER_CONFIG or not (folder / TEMPLATE).exists()
        ):
            _check_templates(file, values["chat_template"])


def config_of(folder: Path) -> dict[str, Any]:
    """What the config.json of a local folder says, which `check` has checked."""
    found: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    return found


def _text(file: Path) -> str | None:
    """The text in the file, or None if there is no file of that name."""
    try:
        with os.fdopen(open_regular(file), "rb") as opened:
            data = opened.read(MOST_BYTES + 1)
            if len(data) > MOST_BYTES:
                raise CheckpointError(f"{file}: has more than {MOST_BYTES >> 20} MiB")
            return data.decode()
    except FileNotFoundError:
        if file.is_symlink():
            raise CheckpointError(f"{file}: is a link to a file that is not there") from None
        return None
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file}: is no text in UTF-8: {error.reason}") from None


def _check_config(file: Path, config: dict[str, Any], overridden: Collection[str]) -> None:
    def refuse(key: str, value: Any, wanted: str) -> CheckpointError:
        return _refuse(file, key, value, wanted)

    for key, (kind, wanted) in KINDS.items():
        value = config.get(key)
        if value is not None and key not in overridden and not isinstance(value, kind):
            raise refuse(key, value, wanted)
    names = config.get("architectures") or []
    if "architectures" not in overridden and not all(isinstance(name, str) for name in names):
        raise refuse("architectures", names, "a list of names")
    text = config.get("text_config")
    for where, values in (("", config), ("text_config.", text)):
        if not isinstance(values, dict):
            continue
        for section in SECTIONS:
            if section not in overridden and isinstance(values.get(section), dict):
                _check_section(file, where + section, values[section])
        for key, (least, most, may_be_null) in SIZES.items():
            value = values.get(key, least)
            if key in overridden or (value is None and values is config and text is not None):
                continue
            # Some models have a number for each layer.
            each = value if isinstance(value, list) and value else [value]
            if not all(_is_size(one, least, most, may_be_null) for one in each):
                raise refuse(where + key, value, f"a whole number from {least} to {most}")


def _is_size(value: Any, least: int, most: int, may_be_null: bool) -> bool:
    if value is None:
        return may_be_null
    return type(value) is int and least <= value <= most


def _check_section(file: Path, name: str, section: dict[str, Any]) -> None:
    """Refuse a section that does not say in which format the weights are.

    vLLM would take them for unquantised.
    """
    producer, what = section.get("producer"), section.get("quantization")
    if producer is not None and not isinstance(producer, dict):
        raise _refuse(file, f"{name}.producer", producer, "an object")
    if isinstance(producer, dict) and producer.get("name") == "modelopt":
        if not isinstance(what, dict):
            raise _refuse(file, f"{name}.quantization", what, "an object")
        return  # It has no quant_method: vLLM goes by `quantization`.
    if isinstance(what, dict) and "modelopt_quant_config" in what:
        return
    method = section.get("quant_method")
    if section and "quant_method" not in section:
        raise CheckpointError(
            f"{file}: {name} has no quant_method: the name of a format is wanted, such as"
            ' "quant_method": "fp8"'
        )
    if section and not (isinstance(method, str) and method):
        raise _refuse(file, f"{name}.quant_method", method, "the name of a format")


def _check_templates(file: Path, found: Any) -> None:
    """Check the chat templates of a file: one text, or several with names."""
    if isinstance(found, list):
        each = [one.get("template") if isinstance(one, dict) else None for one in found]
        named = all(isinstance(one, dict) and isinstance(one.get("name"), str) for one in found)
    else:
        each = [*found.values()] if isinstance(found, dict) else [found]
        named = True
    for text in each:
        if not named or not isinstance(text, str):
            wanted = "a text, or a list of objects with name and template,"
            raise _refuse(file, "chat_template", found, wanted)
        _check_template(file, "chat_template ", text)


def _check_template(file: Path, key: str, text: str) -> None:
    if (fault := template_fault(text)) is not None:
        raise CheckpointError(
            f"{file}: {key}is no valid Jinja: {fault}; chats need it: correct it, or remove it"
        )


def template_fault(text: str) -> str | None:
    """Why transformers, which vLLM asks, cannot compile a chat template; None: it can."""
    from jinja2 import TemplateError, TemplateSyntaxError
    from transformers.utils import chat_template_utils

    try:
        chat_template_utils._compile_jinja_template(text)
    except (TemplateError, RecursionError) as error:
        line = f"line {error.lineno}: " if isinstance(error, TemplateSyntaxError) else ""
        return line + " ".join(str(error).split())[:200]
    return None


def _refuse(file: Path, key: str, value: Any, wanted: str) -> CheckpointError:
    return CheckpointError(f"{file}: {key}={quoted(value)} is not allowed: {wanted} is wanted")
