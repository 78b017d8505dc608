"""The settings of `vllm serve` that make a plan come true, each with its reason."""

import math
import shlex
from dataclasses import dataclass
from typing import Any

import yaml

from lvllm.planning import rounding
from lvllm.planning.choice import Candidate
from lvllm.planning.machine import Machine
from lvllm.planning.placement import resident_layers
from lvllm.planning.shape import ModelShape
from lvllm.settings.variables import BY_KEY
from lvllm.units import GIB, MIB, amount, ranges

__all__ = ["LOCAL", "Chosen", "as_command", "as_yaml", "settings_of", "unserved"]

LEAST_SEQUENCES = 16
"""More requests than the plan's users may come at a time; they share its KV cache."""
SPARE = 0.1
"""The share of the memory that is left which the KV cache may take beyond what was asked for."""
SECTION = "additional_config.lvllm."


@dataclass(frozen=True)
class Chosen:
    """A setting that the plan chose."""

    key: str
    """Of `vllm serve`'s YAML file; LvLLM's own begin with additional_config.lvllm."""
    value: Any
    """A text, a number, or True. A setting that the user gave may also be False or a list."""
    why: str

    @property
    def option(self) -> list[str]:
        """The words of `vllm serve`'s command line, if the setting is one of its options."""
        return [f"--{self.key}"] if self.value is True else [f"--{self.key}", str(self.value)]


LOCAL = Chosen("host", "127.0.0.1", "requests from this machine only; docs/security.md says more")
"""vLLM's own default is all addresses of the machine."""


def settings_of(model: ModelShape, machine: Machine, best: Candidate) -> list[Chosen]:
    """What `vllm serve` is told, in the order of a YAML file."""
    load, how = best.load, best.how
    found = [
        LOCAL,
        Chosen("max-model-len", load.context, "the longest context that was asked for"),
        Chosen(
            "max-num-seqs",
            max(load.users, LEAST_SEQUENCES),
            "requests at a time; they share the KV cache",
        ),
        Chosen(
            "max-num-batched-tokens",
            load.batch,
            "tokens of a prompt computed at once; more need more memory for activations",
        ),
    ]
    if how.on_gpu:
        if machine.gpus > 1:
            found += _cards(model, machine.gpus)
        return found + _on_gpu(model, machine, best)
    contexts = _contexts(model, machine, best)
    cache = MIB * math.ceil(contexts * model.cache_bytes(load.context) / MIB)
    # vLLM rounds each sequence up to blocks, and refuses a cache that is too small for one.
    cache += cache // 8 + 64 * MIB
    found.append(
        Chosen(
            "kv-cache-memory-bytes",
            cache,
            f"{amount(cache)} hold {contexts} x {load.context} tokens, and an eighth more",
        )
    )
    if how.int8_linear:
        found.append(
            Chosen(
                f"{SECTION}dense_weight",
                "INT8",
                "allowed, and a token reads half as many bytes of all weights but the experts",
            )
        )
    return found + _rounded(model, best)


def _cards(model: ModelShape, gpus: int) -> list[Chosen]:
    used = model.cards(gpus)
    why = "the number of GPUs"
    if used < gpus:
        why = f"{gpus} GPUs do not divide the model's attention heads or its experts' rows evenly"
    found = [Chosen("tensor-parallel-size", used, why)]
    if not model.divides_blocks(used):
        why = "whole experts on each GPU: a part of one would not have whole blocks of weights"
        found.append(Chosen("enable-expert-parallel", True, why))
    return found


def _contexts(model: ModelShape, machine: Machine, best: Candidate) -> int:
    """How many longest contexts the KV cache holds: more than asked for where memory is left."""
    spare = SPARE * (machine.memory_bytes - sum(best.memory.host.values()))
    more = int(spare / max(1, model.cache_bytes(best.load.context)))
    return max(best.load.users, min(LEAST_SEQUENCES, more))


def _on_gpu(model: ModelShape, machine: Machine, best: Candidate) -> list[Chosen]:
    how = best.how
    found = []
    if how.resident:
        found.append(
            Chosen(
                f"{SECTION}gpu_resident_moe_layers",
                ranges([layer.number for layer in resident_layers(model, how.resident)]),
                "as many layers' experts as fit beside the KV cache",
            )
        )
    if how.cache:
        size = round(how.cache / GIB, 1)
        held = how.cached_experts(model, model.cards(machine.gpus))
        found.append(
            Chosen(
                f"{SECTION}gpu_expert_cache",
                int(size) if size.is_integer() else size,
                f"GiB of each GPU for the {held} experts that are read most; the KV cache has the"
                " rest",
            )
        )
    if how.streamed_from is not None:
        found += [
            Chosen(
                f"{SECTION}gpu_prefill_min_batch_size",
                how.streamed_from,
                "from so many tokens on, copying a layer's experts is expected to be faster",
            ),
            Chosen(f"{SECTION}gpu_prefetch_window", 1, "a layer is copied while one is computed"),
        ]
    return found + _rounded(model, best)


def _rounded(model: ModelShape, best: Candidate) -> list[Chosen]:
    use = best.how.use_weight
    if not rounding.is_rounded(model, use):
        return []
    saved = model.bits.experts / best.how.expert_bits(model)
    why = f"allowed, and a token reads {saved:.1f} times fewer bytes of experts"
    return [Chosen(f"{SECTION}moe_use_weight", use.value, why)]


def unserved(model: ModelShape) -> str | None:
    """What the plan is for if LvLLM does not serve the model's files; None if it does."""
    if model.stored is None or (what := model.stored.unserved) is None:
        return None
    bits, stored = model.bits.experts, model.stored.bits
    much = "as many bits a weight" if bits == stored else f"{bits:.2f} bits a weight"
    return (
        f"LvLLM does not serve {what}: the plan is for the same model in safetensors, with experts"
        f" in {model.bits.format} of {much}"
    )


def as_yaml(model: str | None, settings: list[Chosen]) -> str:
    """A file for `vllm serve --config`, with the reasons as comments.

    Without a model, the file has settings alone.
    """
    lines = [] if model is None else [f"model: {_plain(model)}"]
    for one in settings:
        lines += [f"# {one.why}", f"{one.key}: {_plain(one.value)}"]
    return "\n".join(lines) + "\n"


def _plain(value: Any) -> str:
    """A value as YAML writes it in one line, quoted where it would be read as something else."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=math.inf)
    return text.removesuffix("...\n").strip()


def as_command(model: str, settings: list[Chosen]) -> str:
    """One line for a shell."""
    variables = ["LVLLM_MOE_NUMA_ENABLED=1"]
    options: list[str] = []
    for one in settings:
        if one.key.startswith(SECTION):
            name = BY_KEY[one.key.removeprefix(SECTION)].name
            variables.append(f"{name}={one.value}")
        else:
            options += one.option
    return " ".join([*variables, "vllm serve", shlex.quote(model), *options])
