"""Resolve each setting: the environment wins over YAML, and YAML over the default."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lvllm.errors import quoted, readable
from lvllm.settings import variables
from lvllm.settings.variables import SettingError, Variable

__all__ = ["SECTION", "Setting", "resolve"]

SECTION = "additional_config.lvllm"
"""The section of vLLM's configuration that holds the settings."""


@dataclass(frozen=True)
class Setting:
    """A setting and its value."""

    variable: Variable
    value: Any
    source: str
    """Where the value came from: "environment", "config" or "default"."""
    written: object = None
    """The value as the user wrote it; None for a default."""

    def refuse(self, reason: str) -> SettingError:
        """An error about this setting: one line with its name, its value and `reason`."""
        where = f"{SECTION}.{self.variable.key}" if self.source == "config" else self.variable.name
        return SettingError(f"{where}={quoted(self.written)}: {reason}")


def resolve(environ: Mapping[str, str], section: object) -> dict[str, Setting]:
    """All settings by their keys, from the environment and the `additional_config.lvllm` section.

    Raises SettingError for an unknown name or a value that is not allowed.
    """
    variables.check_names(environ)
    if section is None:
        section = {}
    if not isinstance(section, Mapping):
        raise SettingError(f"{SECTION}={quoted(section)} is not allowed: a mapping")
    _check_keys(section)
    settings = {}
    for key, variable in variables.BY_KEY.items():
        sources = (
            ("environment", environ.get(variable.name), variable.name),
            ("config", section.get(key), f"{SECTION}.{key}"),
        )
        settings[key] = Setting(variable, variable.default, "default")
        for source, written, where in reversed(sources):  # The first source wins.
            value = variables.parse(variable, written, where)
            if not variables.is_unset(written):
                settings[key] = Setting(variable, value, source, written)
    return settings


def _check_keys(section: Mapping[object, object]) -> None:
    allowed = set(variables.BY_KEY) - variables.ENVIRONMENT_ONLY
    for key in section:
        if key in variables.ENVIRONMENT_ONLY:
            name = variables.BY_KEY[str(key)].name
            raise SettingError(
                f"{SECTION}.{key} is not a setting: only the variable {name} sets it"
            )
        if key not in allowed:
            hint = variables.suggest(str(key), allowed)
            raise SettingError(f"{SECTION}.{readable(str(key))} is not a setting: {hint}")
