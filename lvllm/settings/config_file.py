"""The YAML file that `vllm serve --config` gets, as vLLM reads it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lvllm import documents
from lvllm.errors import quoted, readable
from lvllm.settings.variables import SettingError

__all__ = ["as_arguments", "normal", "read", "section"]

ADDITIONAL = "additional_config"


def read(path: Path) -> dict[str, Any]:
    """The file's mapping with normal names.

    Raises SettingError if the file cannot be read or is not called YAML, is no mapping, or has a
    setting twice.
    """
    where = f"--config {readable(str(path))}"
    try:
        content = documents.read(path)
    except documents.DocumentError as error:
        raise SettingError(f"{where}: {error}") from None
    if not str(path).endswith((".yaml", ".yml")):  # vLLM insists on it.
        raise SettingError(f"{where}: a name that ends in .yaml or .yml is wanted")
    if not isinstance(content, dict):
        raise SettingError(f"{where}: a mapping of settings is wanted")
    found: dict[str, Any] = {}
    seen: set[str] = set()
    for written, value in content.items():
        name = normal(written)
        keys = {name} | _keys({name: value})
        for key in sorted(keys & seen):
            raise SettingError(f"{where}: {readable(key)} is written twice")
        seen |= keys
        found[name] = value
    return found


def normal(name: str) -> str:
    """The name of an argument with `-` for `_` up to the first dot, as vLLM reads it.

    `additional_config` stays as it is.
    """
    first, dot, rest = name.partition(".")
    return name if name.startswith("additional") else first.replace("_", "-") + dot + rest


def section(file: Mapping[str, Any]) -> Any:
    """The `additional_config.lvllm` section, from nested mappings and dotted keys alike.

    Raises SettingError if `additional_config` is no mapping.
    """
    found: dict[str, Any] = {}
    for name, value in file.items():
        path = name.split(".")
        if not _is_additional(path):
            continue
        for part in reversed(path[1:]):
            value = {part: value}
        value = _mapping(value)
        if value is not None and not isinstance(value, dict):
            raise SettingError(f"{ADDITIONAL}={quoted(value)} is not allowed: a mapping")
        inner = _mapping((value or {}).get("lvllm"))
        if isinstance(inner, dict):
            found |= inner
        elif inner is not None:
            return inner
    return found


def as_arguments(file: Mapping[str, Any]) -> dict[str, Any]:
    """The file with LvLLM's dotted keys so that vLLM makes the same values of them.

    vLLM passes the value of a dotted key on as an argument, which it reads as JSON. Of `true`, a
    list, a mapping and nothing at all, it makes other arguments than this one.
    """
    return {
        name: json.dumps(value) if _is_own(name) else value
        for name, value in file.items()
        if value is not None or not _is_own(name)
    }


def _is_additional(path: list[str]) -> bool:
    return path[0].replace("-", "_") == ADDITIONAL


def _is_own(name: str) -> bool:
    """Whether this is a dotted key of LvLLM's."""
    path = name.split(".")
    return _is_additional(path) and path[1:2] == ["lvllm"]


def _mapping(value: Any) -> Any:
    """A mapping that is given as the text of one, as vLLM allows; any other value as it is."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            return documents.parse(value)
        except documents.DocumentError as error:
            raise SettingError(f"{ADDITIONAL}={quoted(value)}: {error}") from None
    return value


def _keys(file: Mapping[str, Any]) -> set[str]:
    """The names of LvLLM's settings in a file."""
    own = section(file)
    return {f"{ADDITIONAL}.lvllm.{key}" for key in own} if isinstance(own, dict) else set()
