"""Which settings can be tried around a plan."""

from dataclasses import dataclass

from lvllm.engine.weight_formats import ALL_FORMATS, activation_bits
from lvllm.machine.cpus import default_threads, this_machine
from lvllm.machine.facts import limits
from lvllm.planning import rounding
from lvllm.planning.choice import Candidate
from lvllm.planning.filling import CACHE_UNIT
from lvllm.planning.placement import resident_layers
from lvllm.planning.shape import ModelShape
from lvllm.serving.defaults import Defaults
from lvllm.serving.given import Given, count
from lvllm.settings.use_weight import UseWeight
from lvllm.settings.variables import ThreadBinding
from lvllm.tuning.search import Knob
from lvllm.units import GIB, ranges

__all__ = ["Allowed", "knobs"]


@dataclass(frozen=True)
class Allowed:
    """Which settings may change results."""

    experts: tuple[UseWeight, ...] = ()
    """Formats to which experts may be rounded."""
    int8_linear: bool = False
    activation_bits: bool = False


def knobs(given: Given, plan: Defaults, best: Candidate, allowed: Allowed) -> list[Knob]:
    """What to try beside the plan's best candidate. A setting that the user gave stays as it is.

    What is likely to matter most comes first, since the time may be up before the end.
    """
    found = [*_rounding(plan, best, allowed), *_threads(given, plan)]
    if best.how.on_gpu:
        found += _on_gpu(plan.model, best)
    fixed = {one.variable.name for one in given.settings.values() if one.source != "default"}
    return [knob for knob in found if knob.values and knob.name not in fixed]


def _rounding(plan: Defaults, best: Candidate, allowed: Allowed) -> list[Knob]:
    found = []
    uses = tuple(use for use in allowed.experts if rounding.is_rounded(plan.model, use))
    if uses:
        found.append(Knob("LVLLM_MOE_USE_WEIGHT", tuple(uses), changes_results=True))
    if allowed.int8_linear and not best.how.on_gpu:
        found.append(Knob("LVLLM_DENSE_WEIGHT", ("INT8",), changes_results=True))
    if allowed.activation_bits:
        formats = [use.lower() for use in uses] or [
            part.format for part in best.how.expert_parts(plan.model)
        ]
        others = {
            number
            for format in formats
            for number in ALL_FORMATS[format].activation_bits
            if number != activation_bits(format, None)
        }
        values = tuple(str(number) for number in sorted(others))
        found.append(Knob("LK_ACTIVATION_BITS", values, changes_results=True))
    return found


def _threads(given: Given, plan: Defaults) -> list[Knob]:
    machine = this_machine()
    given_ranks = count(given.options.get("tensor-parallel-size"))
    ranks = given_ranks or plan.model.cards(plan.machine.gpus)
    usual = default_threads(machine, ranks, limits.cpu_quota())
    cores = sum(len(node) for node in machine) // ranks
    # Memory may be read as fast by fewer threads; the default leaves four cores to vLLM.
    numbers = {cores, cores - 1, 3 * cores // 4, cores // 2} - {usual}
    return [
        Knob("LK_THREADS", tuple(str(n) for n in sorted(numbers, reverse=True) if n > 0)),
        Knob("LK_THREAD_BINDING", (ThreadBinding.NUMA_NODE.value,)),
    ]


def _on_gpu(model: ModelShape, best: Candidate) -> list[Knob]:
    how = best.how
    # The plan's estimate of the memory may be too high; a server that lacks it does not start.
    found = []
    if how.cache:
        tenth = max(how.cache / 10, CACHE_UNIT)
        sizes = (how.cache + tenth, how.cache - tenth)
        found.append(
            Knob("LVLLM_GPU_EXPERT_CACHE", tuple(f"{n / GIB:.1f}" for n in sizes if n > 0))
        )
    if how.resident or not how.cache:
        found.append(Knob("LVLLM_GPU_RESIDENT_MOE_LAYERS", _resident(model, how.resident)))
    if how.streamed_from is not None:
        batches = (how.streamed_from // 2, 2 * how.streamed_from)
        values = tuple(str(n) for n in batches if 1 <= n <= best.load.batch)
        found.append(Knob("LVLLM_GPU_PREFILL_MIN_BATCH_SIZE", values))
        found.append(Knob("LVLLM_GPU_PREFETCH_WINDOW", ("2", "0")))
    return found


def _resident(model: ModelShape, count: int) -> tuple[str, ...]:
    """One layer less, one more, and a sixteenth more; the largest first."""
    layers = len(model.moe_layers)
    counts = {count + 1, count + max(2, layers // 16), count - 1}
    return tuple(
        ranges([layer.number for layer in resident_layers(model, n)])
        for n in sorted(counts, reverse=True)
        if 0 < n <= layers
    )
