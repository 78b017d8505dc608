"""The small files of a model beside its weights: config.json, the tokenizer's, chat templates.

vLLM and transformers read them. Where one is damaged, they end in a traceback that does not name
it, or go on as if it were not there. So these files are looked at before: whether each can be read
and is what its name says, and whether the sizes in config.json are numbers.
"""

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from lvllm.checkpoint.files import open_regular
from lvllm.checkpoint.headers import CheckpointError
from lvllm.errors import quoted

__all__ = ["CONFIG", "GENERATION", "TOKENIZER", "check"]

CONFIG = "config.json"
GENERATION = ("generation_config.json",)
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
)

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
    "moe_k": (0, 1 << 16, True),
    "moe_topk": (0, 1 << 16, True),
}
KINDS: dict[str, tuple[type, str]] = {
    "architectures": (list, "a list of names"),
    "model_type": (str, "a name"),
    "quantization_config": (dict, "an object"),
}


def check(folder: Path, names: Collection[str], overridden: Collection[str] = ()) -> None:
    """Raise CheckpointError if one of the files in `folder` called `names` is damaged.

    A file that is not there is not missed. `overridden` are keys of config.json whose values do
    not matter.
    """
    for name in names:
        file = folder / name
        text = _text(file)
        if text is None or file.suffix != ".json":
            continue
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{file}: is no JSON: {error}") from None
        if not isinstance(values, dict):
            raise CheckpointError(f"{file}: is no JSON object, but {quoted(values)}")
        if name == CONFIG:
            _check_config(file, values, overridden)


def _text(file: Path) -> str | None:
    """The text in the file, or None if there is no file of that name."""
    try:
        with os.fdopen(open_regular(file), "rb") as opened:
            return opened.read().decode()
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
        return CheckpointError(f"{file}: {key}={quoted(value)} is not allowed: {wanted} is wanted")

    for key, (kind, wanted) in KINDS.items():
        value = config.get(key)
        if value is not None and key not in overridden and not isinstance(value, kind):
            raise refuse(key, value, wanted)
    text = config.get("text_config")
    for where, values in (("", config), ("text_config.", text)):
        if not isinstance(values, dict):
            continue
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
