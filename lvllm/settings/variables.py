"""Every setting of LvLLM: its name, type, default, range and meaning, in one place.

A setting is an environment variable (`LK_THREADS=8`) or a key of the vLLM configuration
(`additional_config.lvllm.lk_threads: 8`); the variable wins. This module only describes the
settings and parses single values; `lvllm.settings.configuration` resolves them together.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from enum import StrEnum
from typing import Any

from lvllm.errors import LvllmError


class ThreadBinding(StrEnum):
    """Where the operating system may move an engine thread."""

    CPU_CORE = "CPU_CORE"
    NUMA_NODE = "NUMA_NODE"


class UseWeight(StrEnum):
    """The number format the experts have in memory, relative to the checkpoint."""

    TO_DTYPE = "TO_DTYPE"
    KEEP = "KEEP"
    INT4 = "INT4"


class SettingError(LvllmError):
    """A setting that cannot be used."""


def parse_switch(text: str) -> bool:
    """`0` or `1`."""
    if text not in ("0", "1"):
        raise ValueError
    return text == "1"


def parse_choice(*choices: str) -> Callable[[str], str]:
    """A parser of one of `choices`."""

    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError
        return text

    return parse


def parse_layers(text: str) -> tuple[int, ...]:
    """Layer indices and ascending ranges: `0`, `0-1`, `0,9`, `0,1,8-9` -> sorted, unique."""
    layers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]+)(?:-([0-9]+))?\s*", part)
        if match is None:
            raise ValueError
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError
        layers.update(range(first, last + 1))
    return tuple(sorted(layers))


def parse_whole(minimum: int, *words: str) -> Callable[[str], int | str]:
    """A parser of whole numbers of at least `minimum`, in plain decimal digits, or of `words`."""

    def parse(text: str) -> int | str:
        if text in words:
            return text
        if not re.fullmatch(r"[0-9]+", text) or int(text) < minimum:
            raise ValueError
        return int(text)

    return parse


def parse_long_prompt(text: str) -> int | str:
    """`0`, `auto`, or tokens: `1`, meant as a switch, would take every prompt."""
    return text if text == "auto" else 0 if text == "0" else parse_whole(2)(text)


def parse_bits(text: str) -> int:
    """`16` or `8`."""
    if text not in ("16", "8"):
        raise ValueError
    return int(text)


@dataclass(frozen=True)
class Variable:
    """One setting.

    `parse` takes the text of a non-empty value and raises ValueError for one that is not
    `allowed`; `default` is the value of a setting that is unset or empty.
    """

    name: str
    default: Any
    default_text: str
    allowed: str
    meaning: str
    parse: Callable[[str], Any]

    @property
    def key(self) -> str:
        """The name below `additional_config.lvllm`."""
        return self.name.removeprefix("LVLLM_").lower()


VARIABLES: tuple[Variable, ...] = (
    Variable(
        "LVLLM_MOE_NUMA_ENABLED",
        False,
        "0",
        "0 or 1",
        "The main switch. 0: the program is stock vLLM. Only the environment sets it: it is"
        " read before any configuration file is.",
        parse_switch,
    ),
    Variable(
        "LK_THREAD_BINDING",
        ThreadBinding.CPU_CORE,
        "CPU_CORE",
        "CPU_CORE or NUMA_NODE",
        "CPU_CORE pins each engine thread to one core; NUMA_NODE lets it move inside its node.",
        ThreadBinding,
    ),
    Variable(
        "LK_THREADS",
        None,
        "physical cores - 4 (all, on 4 cores or fewer), divided by the ranks on this host",
        "a whole number from 1 to the logical CPUs of one rank",
        "Engine threads of each rank.",
        parse_whole(1),
    ),
    Variable(
        "OMP_NUM_THREADS",
        None,
        "LK_THREADS",
        "a whole number from 1 to the logical CPUs of one rank",
        "PyTorch threads of each rank (attention, norms, sampling on the CPU).",
        parse_whole(1),
    ),
    Variable(
        "LVLLM_MOE_USE_WEIGHT",
        None,
        "the checkpoint's format",
        "TO_DTYPE, KEEP or INT4",
        "Number format of the experts in memory: the model's dtype, the checkpoint's own, or"
        " 4-bit groups made while loading.",
        UseWeight,
    ),
    Variable(
        "LVLLM_ACCELERATOR",
        None,
        "cuda or none, as vLLM's platform",
        "cuda, host or none",
        "Where everything runs but the experts on the CPU. cuda: on an NVIDIA GPU. host: on the CPU"
        " as if it were one, for tests; on vLLM's CPU platform only. none: all experts run on the"
        " CPU.",
        parse_choice("cuda", "host", "none"),
    ),
    Variable(
        "LVLLM_GPU_RESIDENT_MOE_LAYERS",
        (),
        "empty: none",
        "layer indices and ascending ranges, such as 0 or 0-1 or 0,9 or 0,1,8-9",
        "MoE layers whose experts stay on the GPU, as the checkpoint has them, by the model's own"
        " numbering. Layers of a draft or for multi-token prediction always do.",
        parse_layers,
    ),
    Variable(
        "LVLLM_GPU_PREFETCH_WINDOW",
        0,
        "0",
        "a whole number of at least 0",
        "MoE layers copied to the GPU ahead of the one being computed, during GPU prefill.",
        parse_whole(0),
    ),
    Variable(
        "LVLLM_GPU_PREFILL_MIN_BATCH_SIZE",
        0,
        "0: off",
        "a whole number from 0 to max_num_batched_tokens, or auto",
        "Batches of at least this many tokens run their experts on the GPU. auto: as many as make"
        " that faster, by what the bus and the CPUs do when they are measured at start.",
        parse_whole(0, "auto"),
    ),
    Variable(
        "LVLLM_WATCHDOG_SECONDS",
        # vLLM ends an engine whose step takes 300 s, and does not say where it stood. A layer's
        # copy takes a second, its experts' largest batch some ten on a slow CPU.
        120,
        "120",
        "a whole number of at least 0",
        "A copy to the GPU or a layer's experts on the CPU that take longer end the engine with the"
        " name of the layer. 0: never.",
        parse_whole(0),
    ),
    Variable(
        "LK_POWER_SAVING",
        False,
        "0",
        "0 or 1",
        "1: idle engine threads sleep at once instead of spinning briefly for the next layer.",
        parse_switch,
    ),
    Variable(
        "LVLLM_ENABLE_NUMA_INTERLEAVE",
        False,
        "0",
        "0 or 1",
        "0: each weight row lies on the node that computes it. 1: where one node's memory would not"
        " hold its rows, pages are spread over all nodes in turns.",
        parse_switch,
    ),
    Variable(
        "LVLLM_MOE_QUANT_ON_GPU",
        False,
        "0",
        "0 or 1",
        "1: LVLLM_MOE_USE_WEIGHT=INT4 does its arithmetic on the GPU.",
        parse_switch,
    ),
    Variable(
        "LVLLM_SHARE_EXPERTS",
        False,
        "0",
        "0 or 1",
        "1: engines of one user on this host that load the same checkpoint alike keep one copy of"
        " the experts in memory; the first loads it.",
        parse_switch,
    ),
    Variable(
        "LVLLM_PREFILL_ENGINE",
        0,
        "0: off",
        "0, auto or a whole number of at least 2",
        "Prompts of at least this many tokens are prefilled by a second engine over the same"
        " experts, while the first one decodes. auto: as LVLLM_GPU_PREFILL_MIN_BATCH_SIZE, or 512"
        " where that is 0 or auto.",
        parse_long_prompt,
    ),
    Variable(
        "LVLLM_PREFILL_ENGINE_GPU",
        None,
        "the first engine's",
        "a whole number of at least 0",
        "The GPU of the prefill engine, by its number for CUDA. Where both are on one, each takes"
        " half of gpu-memory-utilization.",
        parse_whole(0),
    ),
    Variable(
        "LK_ISA",
        None,
        "the best the CPU has",
        "portable, avx2, avx512, avx512_vnni or avx512_bf16",
        "Forces the engine's instruction set, for tests and bug reports. Environment only.",
        parse_choice("portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16"),
    ),
    Variable(
        "LK_ACTIVATION_BITS",
        None,
        "8 for int8 experts, 16 for all others",
        "16 or 8",
        "8: int8 and int4 experts multiply activations rounded to 8 bits, in blocks with a"
        " scale each, where the CPU has VNNI. 16: they never do. Environment only.",
        parse_bits,
    ),
)

BY_KEY: Mapping[str, Variable] = {variable.key: variable for variable in VARIABLES}

# Read before the configuration is (the switch) or by the engine itself, with or without vLLM.
ENVIRONMENT_ONLY = frozenset({"moe_numa_enabled", "lk_isa", "lk_activation_bits"})


def is_unset(value: object) -> bool:
    """Whether a value from the environment or from YAML counts as not given."""
    return value is None or not str(value).strip()


def parse(variable: Variable, value: object, where: str) -> Any:
    """The parsed `value` of a setting found at `where` (the name the user wrote).

    Raises SettingError with one line that names the setting, the value and what is allowed.
    """
    if is_unset(value):
        return variable.default
    if isinstance(value, bool):
        value = int(value)  # YAML's true/false
    if isinstance(value, list):
        value = ",".join(str(item) for item in value)
    text = str(value).strip()
    try:
        return variable.parse(text)
    except ValueError:
        raise SettingError(f"{where}={text!r} is not allowed: {variable.allowed}") from None


def suggest(name: str, known: Collection[str]) -> str:
    """What to say about an unknown `name`."""
    near = get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"


def check_names(environ: Mapping[str, str]) -> None:
    """Refuse a variable that looks like one of ours and is not: a typo would be ignored."""
    known = {variable.name for variable in VARIABLES}
    for name in sorted(environ):
        if name.startswith(("LVLLM_", "LK_")) and name not in known:
            raise SettingError(f"{name} is not a setting of LvLLM: {suggest(name, known)}")


def enabled(environ: Mapping[str, str]) -> bool:
    """Whether the main switch is on."""
    variable = BY_KEY["moe_numa_enabled"]
    return parse(variable, environ.get(variable.name), variable.name)


def markdown() -> str:
    """The settings as the Markdown document `docs/configuration.md`."""
    lines = [
        "# Settings",
        "",
        "Made by `make docs` from `lvllm/settings/variables.py`; do not edit by hand.",
        "",
        "Each setting is an environment variable, or a key below `additional_config.lvllm` in the",
        "YAML file of `vllm serve --config`. Where both are given, the variable wins. An empty",
        "value counts as unset. `lvllm env --config config.yaml` prints what is in force and",
        "where each value came from.",
        "",
        "| variable | YAML key | default | allowed | meaning |",
        "|---|---|---|---|---|",
    ]
    for v in VARIABLES:
        key = "-" if v.key in ENVIRONMENT_ONLY else f"`{v.key}`"
        lines.append(f"| `{v.name}` | {key} | {v.default_text} | {v.allowed} | {v.meaning} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
