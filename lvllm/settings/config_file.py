"""The YAML file that `vllm serve --config` gets, as vLLM reads it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lvllm.settings.variables import SettingError

__all__ = ["read", "section"]


def read(path: Path) -> dict[str, Any]:
    """The file's mapping with `_` in top-level names as `-`, as vLLM reads it.

    Raises SettingError if the file cannot be read or is no mapping.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise SettingError(f"--config {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise SettingError(f"--config {path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise SettingError(f"--config {path}: a mapping of settings is wanted")
    return {
        name if name.startswith("additional") else name.replace("_", "-"): value
        for name, value in content.items()
    }


def section(file: Mapping[str, Any]) -> Any:
    """The `additional_config.lvllm` section, from nested mappings and dotted keys alike."""
    found: dict[str, Any] = {}
    for name, value in file.items():
        path = name.split(".")
        if path[0].replace("-", "_") != "additional_config":
            continue
        for part in reversed(path[1:]):
            value = {part: value}
        inner = value.get("lvllm") if isinstance(value, dict) else None
        if isinstance(inner, dict):
            found |= inner
        elif inner is not None:
            return inner
    return found
