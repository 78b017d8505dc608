"""Tables that answer questions: the staging ring, a shared batch, and what to measure first."""

from benchmarks.gpu_model.layers import Parts
from benchmarks.gpu_model.machines import MACHINES
from benchmarks.gpu_model.models import CHUNK, SHAPES
from benchmarks.gpu_model.predictions import Prediction
from benchmarks.gpu_model.shared import shared
from benchmarks.gpu_model.tables import prediction, table
from benchmarks.gpu_model.vary import RATES

__all__ = ["break_evens", "sensitivity", "shared_batches", "staging"]

STAGING = (512, 1024, 2048, 3072, 4096, 8192, 12288)
VARIED = ("GLM-4.5-Air", "int4")
QUARTER = (0.75, 1.25)


def staging() -> str:
    """Prefill of DeepSeek-V3 with staging rings of several sizes."""
    rows = []
    for machine in MACHINES:
        one = prediction("DeepSeek-V3", "int4", machine)
        if one.lacks:
            continue
        spent = [one.staged(mib) for mib in STAGING]
        best = min(spent, key=lambda each: each.seconds)
        busy = f"{best.bus:.1f}, {best.gpu:.1f} of {best.seconds:.1f}"
        rows.append((machine, *(f"{CHUNK / each.seconds:.0f}" for each in spent), busy))
    sizes = " | ".join(f"{mib} MiB" for mib in STAGING)
    return table(f"machine | {sizes} | bus and GPU busy, seconds, at best", rows)


def shared_batches() -> str:
    """What a shared batch would gain at half, once and twice the break-even."""
    rows = []
    for name in SHAPES:
        for machine in MACHINES:
            one = prediction(name, "int4", machine)
            if one.lacks:
                continue
            even = one.prefill.threshold
            found = [shared(one.prefill, one.parts, n) for n in (even // 2, even, 2 * even)]
            cells = (f"{each.gain:.2f} / {each.prompt_gain:.2f}" for each in found)
            row = (f"{name} int4", machine, str(even), f"{1e3 * found[1].gpu:.1f}", *cells)
            rows.append(row)
    return table("model | machine | break-even | a layer, ms | half of it | once | twice", rows)


def break_evens() -> str:
    """The break-even of one layer, as LvLLM measures it, and of whole prompts."""
    rows = []
    for machine in MACHINES:
        prefill = prediction("Qwen3-30B-A3B", "int4", machine).prefill
        rows.append((machine, str(prefill.threshold), str(prefill.break_even_of_prompts())))
    return table("machine | of a layer | of whole prompts", rows)


def sensitivity() -> str:
    """How three numbers of a model change with a quarter less and more of each rate.

    They are the speeds of prefill and decoding, and the break-even.
    """
    rows = {rate: [rate] for rate in RATES}
    for machine in MACHINES:
        parts = prediction(*VARIED, machine).parts
        base = _numbers(parts)
        for rate, vary in RATES.items():
            low, high = (_numbers(vary(parts, times)) for times in QUARTER)
            rows[rate].append("; ".join(map(_change, base, low, high)))
    return table("rate | " + " | ".join(MACHINES), [*rows.values()])


def _numbers(parts: Parts) -> tuple[float, float, float]:
    """Tokens a second of a prompt and of one user's answer, and the break-even."""
    one = Prediction(parts)
    step = one.decode(1)
    assert step, "the varied model fits"
    return CHUNK / one.short.seconds, step.rate, one.prefill.threshold


def _change(base: float, low: float, high: float) -> str:
    less, more = low / base - 1, high / base - 1
    return "0" if max(abs(less), abs(more)) < 0.005 else f"{less:+.0%} {more:+.0%}"
