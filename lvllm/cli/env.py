"""`lvllm env`: the settings in force and where each came from."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from lvllm import engine
from lvllm.checkpoint.moe_layers import describe_layers
from lvllm.machine import cpus
from lvllm.settings.resolving import Setting, resolve
from lvllm.settings.variables import SettingError


def env(
    config_file: Annotated[
        Path | None,
        typer.Option("--config", help="The YAML file that `vllm serve --config` gets."),
    ] = None,
    patches: Annotated[
        bool,
        typer.Option("--patches", help="List what LvLLM replaces in vLLM instead."),
    ] = False,
) -> None:
    """Print every setting, its value and its source (environment, config, default).

    docs/configuration.md says what each one means, and docs/patches.md why each replacement is
    there.
    """
    if patches:
        Console().print(_patches())
        return
    try:
        file = read_yaml(config_file) if config_file else {}
        settings = resolve(os.environ, section(file))
        machine_defaults = _machine_defaults(settings, file)
    except SettingError as error:
        raise SystemExit(f"lvllm: {error}") from None
    table = Table("setting", "value", "source")
    table.columns[0].no_wrap = True
    for key, setting in settings.items():
        value = setting.value if setting.value is not None else machine_defaults.get(key)
        table.add_row(setting.variable.name, _text(value, setting), setting.source)
    Console().print(table)


def _patches() -> Table:
    from lvllm.patches import patches

    table = Table("target", "platform", "why", "can go when", show_lines=True)
    table.columns[0].overflow = "fold"
    for patch in patches():
        table.add_row(patch.target, patch.platform or "all", patch.why, patch.until)
    return table


def _text(value: Any, setting: Setting) -> str:
    if isinstance(value, tuple):
        return describe_layers(list(value)) or "(none)"
    if isinstance(value, bool):
        return str(int(value))
    return f"({setting.variable.default_text})" if value is None else str(value)


def _machine_defaults(
    settings: Mapping[str, Setting], file: Mapping[str, Any]
) -> dict[str, int | str]:
    """What unset settings come to on this machine, with the ranks that `file` asks for."""
    ranks = 1
    for name in ("tensor-parallel-size", "pipeline-parallel-size", "data-parallel-size"):
        size = file.get(name, 1)
        if not isinstance(size, int) or size < 1:
            raise SettingError(f"{name}={size!r} is not allowed: a whole number of at least 1")
        ranks *= size
    default = cpus.default_threads(cpus.this_machine(), ranks)
    lk_threads = settings["lk_threads"].value or default
    return {
        "lk_threads": lk_threads,
        "omp_num_threads": lk_threads,
        "lk_isa": engine.info().isa,
    }


def read_yaml(path: Path) -> dict[str, Any]:
    """The file's mapping with `_` in top-level names as `-`, as vLLM reads it."""
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
