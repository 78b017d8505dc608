"""The file for `vllm serve --config` that has the settings which were found."""

import json
import re
from collections.abc import Mapping
from typing import Any

from lvllm.planning.settings import SECTION, Chosen, as_yaml
from lvllm.serving.launch import Launch
from lvllm.settings.variables import ENVIRONMENT_ONLY, VARIABLES

__all__ = ["config_yaml", "environment_of"]

SAID = "as you said"
KEYS = {variable.name: variable.key for variable in VARIABLES}


def config_yaml(launch: Launch, changes: Mapping[str, str], gain: float) -> str:
    """The model, what the user said, what the plan chose, and what tuning changed, with reasons."""
    given = launch.given
    chosen = [
        Chosen(name, _scalar(value), SAID)
        for name, value in given.options.items()
        if name not in ("config", "model") and not name.startswith("additional")
    ]
    chosen += [
        Chosen(f"{SECTION}{key}", _own(one.written), SAID)
        for key, one in given.settings.items()
        if one.source != "default" and key not in ENVIRONMENT_ONLY
    ]
    own = {f"{SECTION}{KEYS[name]}" for name in changes}
    planned = launch.plan.settings if launch.plan else ()
    chosen += [one for one in planned if one.key not in own]
    chosen += [
        Chosen(f"{SECTION}{KEYS[name]}", value, f"measured: {gain:.2f} times the plan's rate")
        for name, value in changes.items()
        if KEYS[name] not in ENVIRONMENT_ONLY
    ]
    return as_yaml(str(given.model), chosen)


def environment_of(launch: Launch, changes: Mapping[str, str]) -> dict[str, str]:
    """Variables that have no place in the file."""
    found = {"LVLLM_MOE_NUMA_ENABLED": "1"}
    for key in sorted(ENVIRONMENT_ONLY):
        one = launch.given.settings[key]
        name = one.variable.name
        if name in changes:
            found[name] = changes[name]
        elif one.source == "environment":
            found[name] = str(one.written)
    return found


def _own(value: Any) -> Any:
    """A value of LvLLM's own settings, which may be lists."""
    return value if isinstance(value, list) else _scalar(value)


def _scalar(value: Any) -> str | int:
    """What vLLM reads as this value: it takes JSON where a mapping or a list is wanted."""
    if isinstance(value, int):
        return value
    if not isinstance(value, str):
        return json.dumps(value)
    return int(value) if re.fullmatch("-?[0-9]+", value) else value
