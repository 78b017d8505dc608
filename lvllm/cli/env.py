"""`lvllm env`: the settings in force and where each came from."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lvllm import engine
from lvllm.errors import quoted
from lvllm.machine import cpus
from lvllm.machine.facts import limits
from lvllm.settings import config_file
from lvllm.settings.kinds import whole
from lvllm.settings.resolving import Setting, resolve
from lvllm.settings.variables import SettingError
from lvllm.units import ranges

RANKS = whole(1, 65536)


def env(
    path: Annotated[
        Path | None,
        typer.Option("--config", help="The YAML file that `vllm serve --config` gets."),
    ] = None,
    patches: Annotated[
        bool,
        typer.Option("--patches", help="List what LvLLM replaces in vLLM instead."),
    ] = False,
) -> None:
    """Print every setting, its value and its source (environment, config, default).

    A second table says how experts of each format are multiplied on this CPU.

    docs/configuration.md says what each one means, and docs/patches.md why each replacement is
    there.
    """
    if patches:
        Console().print(_patches())
        return
    try:
        file = config_file.read(path) if path else {}
        settings = resolve(os.environ, config_file.section(file))
        machine_defaults = _machine_defaults(settings, file)
    # The engine's own ValueError is about an LK_ISA that this CPU lacks.
    except ValueError as error:
        raise SystemExit(f"lvllm: {error}") from None
    table = Table("setting", "value", "source")
    table.columns[0].no_wrap = True
    for key, setting in settings.items():
        value = setting.value if setting.value is not None else machine_defaults.get(key)
        table.add_row(setting.variable.name, _text(value, setting), setting.source)
    Console().print(table)
    Console().print(_arithmetics())


def _arithmetics() -> Table:
    """How experts of each format are multiplied on this machine."""
    rates = engine.info().rates
    table = Table("experts", "activations", "multiplied as", "billion weights a second and core")
    for name, bits, arithmetic in engine.format_arithmetics():
        rate = rates.get(arithmetic)
        table.add_row(
            name, f"{bits} bits", str(arithmetic), "" if rate is None else f"{rate / 1e9:.0f}"
        )
    return table


def _patches() -> Table:
    from lvllm.patches import patches

    table = Table("target", "platform", "why", "can go when", show_lines=True)
    table.columns[0].overflow = "fold"
    for patch in patches():
        table.add_row(patch.target, patch.platform or "all", patch.why, patch.until)
    return table


def _text(value: Any, setting: Setting) -> str:
    if isinstance(value, tuple):
        return ranges(list(value)) or "(none)"
    if isinstance(value, bool):
        return str(int(value))
    # rich would take `[0-3]` in a pattern for markup.
    return escape(f"({setting.variable.default_text})" if value is None else str(value))


def _machine_defaults(
    settings: Mapping[str, Setting], file: Mapping[str, Any]
) -> dict[str, int | str]:
    """What unset settings come to on this machine, with the ranks that `file` asks for."""
    ranks = 1
    for name in ("tensor-parallel-size", "pipeline-parallel-size", "data-parallel-size"):
        written = file.get(name, 1)
        try:
            ranks *= RANKS.read(written)
        except ValueError:
            raise SettingError(
                f"{name}={quoted(written)} is not allowed: {RANKS.allowed}"
            ) from None
    default = cpus.default_threads(cpus.this_machine(), ranks, limits.cpu_quota())
    lk_threads = settings["lk_threads"].value or default
    return {
        "lk_threads": lk_threads,
        "omp_num_threads": lk_threads,
        "lk_isa": engine.info().isa,
    }
