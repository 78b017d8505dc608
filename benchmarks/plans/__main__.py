"""Writes docs/plans.md and its translation: `python -m benchmarks.plans`."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from benchmarks.pages import SUFFIXES, table
from benchmarks.plans.machines import MACHINE_OF, MACHINES
from benchmarks.plans.models import MODELS, shape_of
from benchmarks.plans.others import OTHERS
from benchmarks.plans.texts import CHINESE, PAGE
from lvllm.planning.choice import Candidate, choose
from lvllm.planning.placement import Load
from lvllm.planning.speed import limit
from lvllm.units import GIB

Say = Callable[[str], str]
Row = tuple[str, ...]

FOLDER = Path(__file__).parents[2] / "docs"
LOAD = Load(prompt=8192, answer=512, context=16384)
SAY: dict[str, Say] = {"en": str, "zh": CHINESE.__getitem__}
"""What makes a word of each language from the English one."""
SHORT = {
    "everything on the CPU": "CPU",
    "everything on the GPU": "GPU",
    "every batch streamed": "streamed",
    "long prompts streamed": "hybrid",
    "experts on the CPU": "experts",
    "streamed and cached": "hybrid, cached",
    "most used experts cached": "experts, cached",
}


def pages() -> Iterator[tuple[Path, str]]:
    """The page in each language, and its current text."""
    for language, suffix in SUFFIXES.items():
        say = SAY[language]
        text = PAGE[language].format(
            prompt=LOAD.prompt,
            answer=LOAD.answer,
            machines=table(_machines(say)),
            models=table(_models(say)),
            plans=table(_plans(say)),
            others=table(_others(say)),
        )
        yield FOLDER / f"plans{suffix}", text


def _machines(say: Say) -> list[Row]:
    rows: list[Row] = [(say("class"), say("machine"), say("read from memory"))]
    for name, machine in MACHINES.items():
        rows.append((say(name), say(MACHINE_OF[name]), f"{machine.read_gb_per_s:.0f} GB/s"))
    return rows


def _models(say: Say) -> list[Row]:
    head = ("model", "billion weights", "for a token", "experts", "in GiB", "all else in GiB")
    rows: list[Row] = [tuple(map(say, head))]
    for published in MODELS:
        model = shape_of(published.name)
        bits = say("{format}, {bits:.2f} bits")
        rows.append(
            (
                published.name,
                f"{(model.routed + model.others) / 1e9:.1f}",
                f"{model.active / 1e9:.1f}",
                bits.format(format=model.bits.format, bits=model.bits.experts),
                f"{model.routed * model.bits.experts / 8 / GIB:.0f}",
                f"{model.others * model.bits.others / 8 / GIB:.1f}",
            )
        )
    return rows


@cache
def _best(model: str, machine: str) -> Candidate | None:
    return choose(shape_of(model), MACHINES[machine], LOAD).best


def _plans(say: Say) -> list[Row]:
    def cell(best: Candidate | None) -> str:
        if best is None:
            return "-"
        speed = best.speed
        return f"{speed.prefill_rate:.0f} / {speed.decode_rate:.1f} {say(SHORT[best.name])}"

    rows: list[Row] = [(say("model"), *map(say, MACHINES))]
    for published in MODELS:
        cells = (cell(_best(published.name, machine)) for machine in MACHINES)
        rows.append((published.name, *cells))
    return rows


def _others(say: Say) -> list[Row]:
    head = ("what", "prompt", "phase", "published", "predicted", "ratio", "predicted limit")
    rows: list[Row] = [tuple(map(say, head))]
    for one in OTHERS:
        best = choose(shape_of(one.model), one.machine, one.load).best
        if best is None:
            raise SystemExit(f"{one.what}: the model does not fit")
        pairs = {
            "prefill": (one.prefill, best.speed.prefill_rate, best.speed.prefill),
            "decode": (one.decode, best.speed.decode_rate, best.speed.decode),
        }
        for name, (published, predicted, seconds) in pairs.items():
            if published is not None:
                numbers = (f"{published:.0f}", f"{predicted:.0f}", f"{predicted / published:.2f}")
                ends = (say(name), *numbers, say(limit(seconds)))
                rows.append((say(one.what), str(one.load.prompt), *ends))
    return rows


if __name__ == "__main__":
    for file, text in pages():
        file.write_text(text)
