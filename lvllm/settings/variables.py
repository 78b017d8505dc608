"""All settings of LvLLM in one place: the name, type, default, range and meaning of each.

A setting is an environment variable (`LK_THREADS=8`) or a key of the vLLM configuration
(`additional_config.lvllm.lk_threads: 8`). If both are given, the variable wins. This module
describes the settings and parses single values; `lvllm.settings.resolving` resolves them together,
and `lvllm.prepare` checks them against the model and the machine.
"""

import re
import string
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from enum import StrEnum
from typing import Any

from lvllm.errors import LvllmError, quoted, readable
from lvllm.settings.kinds import (
    LAYERS,
    MOST,
    MOST_LAYER,
    PROMPT,
    SIZES,
    SWITCH,
    USE_WEIGHT,
    Kind,
    choice,
    whole,
)
from lvllm.settings.use_weight import WrongRules


class ThreadBinding(StrEnum):
    """Where the operating system may move an engine thread."""

    CPU_CORE = "CPU_CORE"
    NUMA_NODE = "NUMA_NODE"


class DenseWeight(StrEnum):
    """The number format that linear layers outside the experts have in memory."""

    KEEP = "KEEP"
    INT8 = "INT8"


class SettingError(LvllmError):
    """A setting has a value that is not allowed, or that the model or the machine cannot honour."""


@dataclass(frozen=True)
class Variable:
    """One setting; `default` is its value if it is unset or empty."""

    name: str
    default: Any
    default_text: str
    kind: Kind
    meaning: str

    @property
    def key(self) -> str:
        """The name below `additional_config.lvllm`."""
        return self.name.removeprefix("LVLLM_").lower()


# Linux counts no more than 8192 logical CPUs.
CPUS = whole(1, 8192, most="the logical CPUs of one rank")

VARIABLES: tuple[Variable, ...] = (
    Variable(
        "LVLLM_MOE_NUMA_ENABLED",
        False,
        "0",
        SWITCH,
        "The main switch. With 0 the program is stock vLLM. It can only be set in the environment,"
        " because it is read before any configuration file.",
    ),
    Variable(
        "LK_THREAD_BINDING",
        ThreadBinding.CPU_CORE,
        "CPU_CORE",
        choice(ThreadBinding),
        "CPU_CORE pins each engine thread to one core. NUMA_NODE lets the operating system move a"
        " thread within its NUMA node, which suits machines that run other programs too.",
    ),
    Variable(
        "LK_THREADS",
        None,
        "physical cores - 4 (all, on 4 cores or fewer; a CPU quota of the cgroup counts as so many"
        " cores), divided by the ranks on this host",
        CPUS,
        "The number of engine threads in each rank.",
    ),
    Variable(
        "OMP_NUM_THREADS",
        None,
        "LK_THREADS",
        CPUS,
        "The number of PyTorch threads in each rank. They compute attention, norms and sampling"
        " when these run on the CPU.",
    ),
    Variable(
        "LVLLM_MOE_USE_WEIGHT",
        None,
        "the checkpoint's format",
        USE_WEIGHT,
        "The number format of the experts in memory. KEEP computes them in the checkpoint's own"
        " format. TO_DTYPE converts them to the model's dtype while loading. INT4 quantises bf16,"
        " fp16, FP8 and int8 experts to 4-bit integers in groups of 32 while loading, and INT8 and"
        " FP8 quantise bf16 and fp16 experts to 8 bits with a scale for each row. Rules give"
        " layers different formats: in YAML a list such as `[{'layers\\.[0-3]\\.': KEEP}, {'.*':"
        ' INT4}]`, and in the variable the same as JSON, `[{"layers\\\\.[0-3]\\\\.": "KEEP"},'
        ' {".*": "INT4"}]`. A rule has a regular expression, which is looked for in vLLM\'s names'
        " of layers of experts, such as `model.layers.0.mlp.experts`. The first rule that matches"
        " counts, and layers that none matches are kept. A rule that decides about no layer stops"
        " the start.",
    ),
    Variable(
        "LVLLM_DENSE_WEIGHT",
        None,
        "KEEP",
        choice(DenseWeight),
        "The number format of linear layers outside the experts: attention's projections, shared"
        " experts and the head. INT8 rounds them to 8-bit integers with a scale for each row while"
        " loading, so that a token reads half as many bytes. Layers with fewer than 1024 rows, such"
        " as routers, stay as they are. It is for models with experts on CPUs without a GPU.",
    ),
    Variable(
        "LVLLM_ACCELERATOR",
        None,
        "cuda or none, as vLLM's platform",
        choice(("cuda", "host", "none")),
        "The device that runs attention and everything else outside the CPU's experts. cuda is an"
        " NVIDIA GPU. none means that there is no GPU and that the CPU computes all experts. host"
        " is for tests: it runs the code for GPUs on the CPU, and works on vLLM's CPU platform"
        " only.",
    ),
    Variable(
        "LVLLM_GPU_RESIDENT_MOE_LAYERS",
        (),
        "empty: none",
        LAYERS,
        "The MoE layers whose experts stay on the GPU, in the checkpoint's format. The numbers are"
        " the model's own layer numbers. The layers of a draft model and of multi-token prediction"
        " always stay on the GPU.",
    ),
    Variable(
        "LVLLM_GPU_PREFETCH_WINDOW",
        0,
        "0",
        whole(0, MOST_LAYER),
        "During GPU prefill, the number of MoE layers that are copied to the GPU ahead of the layer"
        " being computed, as far as LVLLM_GPU_STAGING_MIB allows.",
    ),
    Variable(
        "LVLLM_GPU_STAGING_MIB",
        1024,
        "1024",
        whole(1, 1 << 20),
        "During GPU prefill, the most memory on each GPU for copies of experts, in MiB. Two experts"
        " always have room.",
    ),
    Variable(
        "LVLLM_GPU_PREFILL_MIN_BATCH_SIZE",
        0,
        "0: off",
        whole(0, MOST, "auto", most="max_num_batched_tokens"),
        "The GPU computes the experts of batches with at least this many tokens, on copies of the"
        " weights that are streamed to it. auto measures the bus and the CPU at start and takes"
        " the smallest batch for which streaming is faster.",
    ),
    Variable(
        "LVLLM_GPU_EXPERT_CACHE",
        (0,),
        "0: off",
        SIZES,
        "The GPU's memory for the experts that are read most, of all layers that are not resident."
        " The GPU computes them while the CPU computes the others. They are chosen by what is read"
        " while the server answers, and replaced between two steps. auto takes what the KV cache"
        " does not need: the KV cache keeps a quarter of the free memory, and at least what two"
        " requests of max-model-len take.",
    ),
    Variable(
        "LVLLM_GPU_CALL",
        "hostfunc",
        "hostfunc",
        choice(("hostfunc", "mailbox", "auto")),
        "How the GPU calls the CPU's experts. hostfunc lets CUDA call a function of the host. With"
        " mailbox the GPU writes a word that a thread watches, which keeps a core busy while"
        " requests are answered. auto times both at start and takes the faster.",
    ),
    Variable(
        "LVLLM_DEFER_EXPERTS",
        0,
        "0: off",
        whole(0, 1023, most="one less than the experts that a token takes"),
        "In batches of at most 8 tokens, so many of each token's experts, those with the least"
        " weights, are added one MoE layer later. The CPU computes them while the GPU runs the next"
        " layer's attention. The model's answers change: docs/quality.md measures by how much.",
    ),
    Variable(
        "LVLLM_WATCHDOG_SECONDS",
        # vLLM ends an engine whose step takes 300 s without naming the layer that hangs. Copying a
        # layer takes about a second, and the largest batch some ten seconds on a slow CPU.
        120,
        "120",
        whole(0, 86400),
        "If work beside a GPU is queued and none of it ends for this long, the engine ends with an"
        " error that names the layer. 0 disables the check.",
    ),
    Variable(
        "LVLLM_VERIFY",
        False,
        "0",
        SWITCH,
        "With 1, the engine's results for two experts of each layer are compared with PyTorch's in"
        " float32 when the model is loaded, and these experts' weights are looked at. A wrong"
        " layer stops the start. This takes 20 seconds at most; `lvllm verify` looks at"
        " everything.",
    ),
    Variable(
        "LVLLM_METRICS_EXPERTS",
        False,
        "0",
        SWITCH,
        "With 1, `/metrics` also has the tokens of each expert of each layer, which"
        " `lvllm top --experts` shows. A model of 58 layers with 256 experts has 14,848 such"
        " numbers, 1.5 MB of text at each scrape.",
    ),
    Variable(
        "LK_POWER_SAVING",
        False,
        "0",
        SWITCH,
        "With 1, idle engine threads sleep at once. With 0, they first spin for 50 microseconds to"
        " be ready for the next layer, or beside a GPU for up to 2 milliseconds.",
    ),
    Variable(
        "LVLLM_ENABLE_NUMA_INTERLEAVE",
        False,
        "0",
        SWITCH,
        "With 0, each weight row lies on the NUMA node whose threads compute it, and a model that"
        " does not fit this way is refused. With 1, such a model is loaded with the experts' pages"
        " spread round-robin over all nodes.",
    ),
    Variable(
        "LVLLM_MOE_QUANT_ON_GPU",
        False,
        "0",
        SWITCH,
        "With 1, the GPU does the arithmetic of LVLLM_MOE_USE_WEIGHT=INT4, INT8 or FP8.",
    ),
    Variable(
        "LVLLM_SHARE_EXPERTS",
        False,
        "0",
        SWITCH,
        "With 1, servers of the same user on this host that load the same checkpoint with the same"
        " settings share one copy of the experts in memory. A bank (`lvllm bank`) holds it; without"
        " one, the first server loads it, and the others map it. Containers must share a network"
        " namespace, and full speed needs Linux 6.1 or newer.",
    ),
    Variable(
        "LVLLM_PREFILL_ENGINE",
        0,
        "0: off",
        PROMPT,
        "A second engine over the same experts prefills prompts of at least this many tokens, so"
        " that running answers continue meanwhile. auto takes LVLLM_GPU_PREFILL_MIN_BATCH_SIZE, or"
        " 512 where that is 0 or auto. The engine must have a single worker.",
    ),
    Variable(
        "LVLLM_PREFILL_ENGINE_GPU",
        None,
        "the first engine's",
        whole(0, 1023),
        "The GPU of the prefill engine, as CUDA numbers them. If both engines use the same GPU,"
        " each takes half of gpu-memory-utilization.",
    ),
    Variable(
        "LK_ISA",
        None,
        "what is fastest here",
        choice(
            (
                "portable",
                "avx2",
                "avx2_vnni",
                "avx512",
                "avx512_vnni",
                "avx512_vbmi",
                "avx512_bf16",
                "amx",
            )
        ),
        "Forces the engine's instruction set, for tests and bug reports. By default the engine"
        " measures at its start what multiplies fastest for each format of experts (a millisecond),"
        " and `lvllm env` shows it. It can only be set in the environment.",
    ),
    Variable(
        "LK_ACTIVATION_BITS",
        "auto",
        "auto",
        choice(("auto", "8", "16")),
        "With 8, int8, int4, mxfp4 and nvfp4 experts are multiplied by activations that are rounded"
        " to 8 bits, in blocks with one scale each, where the CPU multiplies bytes: 4-bit experts"
        " need AVX2, and int8 experts need VNNI. With 16, activations are never rounded to 8 bits."
        " auto takes 8 for int4, mxfp4 and nvfp4, where that adds less than a tenth to the loss of"
        " quality by the 4-bit weights, and 16 for int8. It can only be set in the environment.",
    ),
)

BY_KEY: Mapping[str, Variable] = {variable.key: variable for variable in VARIABLES}

# The main switch is read before any configuration file. The others also apply to the engine when it
# is used without vLLM.
ENVIRONMENT_ONLY = frozenset({"moe_numa_enabled", "lk_isa", "lk_activation_bits"})


def is_unset(value: object) -> bool:
    """Whether a value from the environment or from YAML counts as not given."""
    return value is None or (isinstance(value, str) and not value.strip(string.whitespace))


# Kubernetes gives every container such variables for each Service of its namespace. Those of a
# Service named lvllm begin with LVLLM_.
OF_A_SERVICE = re.compile(r"_SERVICE_(HOST|PORT(_\w+)?)\Z|_PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?\Z")
KUBERNETES_HINT = (
    "Kubernetes sets it for a Service; put `enableServiceLinks: false` into the pod's spec"
)


def parse(variable: Variable, value: object, where: str) -> Any:
    """The parsed `value` of a setting found at `where` (the name the user wrote).

    White space around a text does not count.

    Raises SettingError with one line that names the setting, the value and what is allowed.
    """
    if is_unset(value):
        return variable.default
    if isinstance(value, str):
        value = value.strip(string.whitespace)
    try:
        return variable.kind.read(value)
    except WrongRules as error:
        reason = str(error)
    except ValueError:
        reason = variable.kind.allowed
    raise SettingError(f"{where}={quoted(value)} is not allowed: {reason[:400]}")


def suggest(name: str, known: Collection[str]) -> str:
    """A hint about an unknown `name`: the most similar known name, or else all known names."""
    near = get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"


def unknown_names(environ: Mapping[str, str]) -> list[str]:
    """The variables whose name begins with LVLLM_ or LK_ and that are no setting, sorted."""
    known = {variable.name for variable in VARIABLES}
    return sorted(
        name for name in environ if name.startswith(("LVLLM_", "LK_")) and name not in known
    )


def check_names(environ: Mapping[str, str]) -> None:
    """Raise SettingError for the first of `unknown_names`.

    Otherwise a misspelt variable would have no effect, without a word.
    """
    for name in unknown_names(environ):
        raise SettingError(_no_setting(name))


def _no_setting(name: str) -> str:
    known = {variable.name for variable in VARIABLES}
    hint = KUBERNETES_HINT if OF_A_SERVICE.search(name) else suggest(name, known)
    return f"{readable(name)} is not a setting of LvLLM: {hint}"


def wrong(environ: Mapping[str, str]) -> dict[str, str]:
    """Why LvLLM refuses variables of the environment, one line for each, by their names."""
    refused = {name: _no_setting(name) for name in unknown_names(environ)}
    for variable in VARIABLES:
        try:
            parse(variable, environ.get(variable.name), variable.name)
        except SettingError as error:
            refused[variable.name] = str(error)
    return refused


def enabled(environ: Mapping[str, str]) -> bool:
    """Whether the main switch is on."""
    variable = BY_KEY["moe_numa_enabled"]
    return parse(variable, environ.get(variable.name), variable.name)


def markdown() -> str:
    """Return the Markdown text of `docs/configuration.md`."""
    lines = [
        "# Settings",
        "",
        "`make docs` generates this page from `lvllm/settings/variables.py`; do not edit it by",
        "hand.",
        "",
        "Each setting is an environment variable, or a key below `additional_config.lvllm` in the",
        "YAML file that you give to `vllm serve --config`. If both are given, the variable wins.",
        "A wrong value or a misspelt name stops the start with one line that says what is allowed.",
        "",
        "- An empty value counts as unset, in YAML also `null` and a key with nothing behind it.",
        "- White space around a value does not count, and within a value it is not allowed.",
        "- Numbers have plain decimal digits, without sign, leading zeros, `_` and exponent.",
        "- In YAML, a text counts like the same text in a variable. Switches also take `true` and",
        "  `false`, which are no numbers. Layers may be a list, such as `[0, 8-9]`.",
        "- The YAML file is UTF-8 of at most 64 KiB. No key may be written twice. What YAML 1.1",
        "  reads as another number than it looks like, such as `017` and `1:30`, is refused.",
        "",
        "`lvllm env --config config.yaml` prints each setting, its value and where the value came",
        "from.",
        "",
        "| variable | YAML key | default | allowed |",
        "|---|---|---|---|",
    ]
    for v in VARIABLES:
        key = "environment only" if v.key in ENVIRONMENT_ONLY else f"`{v.key}`"
        lines.append(f"| `{v.name}` | {key} | {v.default_text} | {v.kind.allowed} |")
    lines += ["", "## What each setting does"]
    for v in VARIABLES:
        lines += ["", f"**`{v.name}`**: {v.meaning}"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
