"""Makes the command and the environment of `vllm serve` from what the user gave and the plan."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lvllm import api_key
from lvllm.checkpoint.gguf.folder import configuration
from lvllm.checkpoint.gguf_headers import open_gguf
from lvllm.planning import gguf_shape, shape, source
from lvllm.planning.errors import PlanError
from lvllm.planning.machine import Machine
from lvllm.planning.settings import LOCAL, SECTION
from lvllm.planning.speed import limit
from lvllm.serving import given as user
from lvllm.serving.defaults import Defaults, choose
from lvllm.serving.fewer_experts import override, with_fewer
from lvllm.settings.variables import BY_KEY, SettingError

__all__ = ["Launch", "prepare"]

DEMO = Path("examples/models/tiny-moe")
"""The demo model in LvLLM's repository."""
DEMO_OPTIONS = ("--compilation-config.mode", "NONE")
"""Compiling takes half a minute and more, and nobody waits for the demo model's answers."""


@dataclass(frozen=True)
class Launch:
    """How to start the server."""

    command: list[str]
    environment: dict[str, str]
    notes: list[str] = field(default_factory=list)
    """What was chosen, with the reasons, for the user to read."""
    given: user.Given = field(default_factory=user.Given)
    """What the user said; with the demo model, if there was no other."""
    plan: Defaults | None = None
    """None: the model cannot be planned for."""


def prepare(
    words: Sequence[str],
    environ: Mapping[str, str],
    here: Callable[[], Machine],
    experts_per_token: int | None = None,
) -> Launch:
    """The launch for arguments of `vllm serve`, the first of which may be a model.

    Args:
        here: measures this machine. It is asked only if there is a plan to make.
        experts_per_token: how many experts a token takes; None: as the model was trained.

    Raises:
        SettingError: a setting that is not allowed, or a file that cannot be read.
        PlanError: there is no such model, or its tokens take no fewer experts.
    """
    environment = _environment(environ)
    given = user.read(words, environment)
    notes = []
    if environ.get("LK_THREADS") is None and "LK_THREADS" in environment:
        notes.append(f"LK_THREADS={environment['LK_THREADS']}: FT_THREADS says so")
    if given.model is None:
        given = user.read([str(_demo()), *words, *DEMO_OPTIONS], environment)
        notes.append(f"no model was named: this is the demo model, with {' '.join(DEMO_OPTIONS)}")
    options: list[str] = []
    found: Defaults | None = None
    name = str(given.model)
    file = source.gguf_of(name)
    folder = source.folder_of(name) if file is None else file
    if experts_per_token is not None:
        if "hf-overrides" in given.options:
            raise SettingError("--experts-per-token and --hf-overrides exclude each other")
        options += ["--hf-overrides", override(*_config(folder), experts_per_token)]
        notes.append(f"{' '.join(options)}: a token takes {experts_per_token} experts")
    try:
        model = shape.of_folder(folder, name) if file is None else gguf_shape.of_file(file, name)
        if experts_per_token is not None:
            model = with_fewer(model, experts_per_token)
        found = choose(model, here(), given)
    except PlanError as error:
        notes.append(f"no plan, so vLLM's own defaults hold: {error}")
    else:
        notes += _notes(found)
    settings = found.settings if found is not None else ()
    if not settings and LOCAL.key not in given.options:
        settings = (LOCAL,)
    for one in settings:
        if one.key.startswith(SECTION):
            environment[BY_KEY[one.key.removeprefix(SECTION)].name] = str(one.value)
        else:
            options += one.option
    arguments, keys = api_key.split(given.words)
    # A key in the file would win over the variable, which takes a single key.
    if len(keys) == 1 and "api-key" not in user.read(arguments, environment).options:
        environment[api_key.VARIABLE] = keys[0]
    else:
        arguments = list(given.words)
    # -P: a folder called vllm in the working directory is not the package.
    vllm = [sys.executable, "-P", "-m", "lvllm.serving.command", "serve"]
    command = [*vllm, *arguments, *options]
    return Launch(command, environment, notes, given, found)


def _config(model: Path) -> tuple[Mapping[str, Any], str]:
    """config.json in a folder, or what stands for it in a GGUF file; and the name of either."""
    if model.is_dir():
        return shape.read_config(model), str(model / "config.json")
    return configuration(open_gguf(model)), str(model)


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    """With LvLLM switched on, and fastllm's name for the number of threads understood."""
    found = dict(environ)
    switch = found.setdefault("LVLLM_MOE_NUMA_ENABLED", "1") or "1"
    if switch != "1":
        raise SettingError(
            f"LVLLM_MOE_NUMA_ENABLED={switch!r} with `lvllm serve`: allowed is 1;"
            " `vllm serve` is the command without LvLLM"
        )
    found["LVLLM_MOE_NUMA_ENABLED"] = "1"
    if found.get("FT_THREADS") and not found.get("LK_THREADS"):
        found["LK_THREADS"] = found["FT_THREADS"]
    return found


def _demo() -> Path:
    """The demo model, if this runs in LvLLM's repository."""
    beside = Path(__file__).parents[2] / DEMO
    for folder in (DEMO, beside):
        if (folder / "config.json").is_file():
            return folder
    raise SettingError(
        "which model? `lvllm serve MODEL` takes a folder or an id on the hub; the demo model"
        " is in LvLLM's repository"
    )


def _notes(found: Defaults) -> list[str]:
    if found.best is None:
        return [f"the model may not fit, so vLLM's own defaults hold: {found.lacks}"]
    best = found.best
    lines = [
        f"planned for this machine: {best.name}; expected are"
        f" {best.speed.prefill_rate:.0f} tokens/s of a prompt"
        f" (limit: {limit(best.speed.prefill)}) and {best.speed.decode_rate:.1f} of an answer"
        f" (limit: {limit(best.speed.decode)})"
    ]
    for one in found.settings:
        key = one.key
        if key.startswith(SECTION):
            lines.append(f"{BY_KEY[key.removeprefix(SECTION)].name}={one.value}: {one.why}")
        else:
            lines.append(f"{' '.join(one.option)}: {one.why}")
    return lines
