"""Prints docs/plans.md: `python -m benchmarks.plans > docs/plans.md`."""

from collections.abc import Sequence

from benchmarks.plans.machines import MACHINE_OF, MACHINES
from benchmarks.plans.models import MODELS, shape_of
from benchmarks.plans.others import OTHERS
from lvllm.planning.choice import choose
from lvllm.planning.placement import Load
from lvllm.planning.speed import limit
from lvllm.units import GIB

LOAD = Load(prompt=8192, answer=512, context=16384)

HEAD = f"""\
# Plans for published models

`python -m benchmarks.plans` writes this page: what `lvllm plan` predicts for one user with a
prompt of {LOAD.prompt} tokens and an answer of {LOAD.answer}. **These are predictions.** Those of
CPUs rest on measured rates, and those of GPUs on data sheets and estimates, since LvLLM has not run
on a GPU yet. [What the planner assumes](plan.md) has a page of its own.
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD, "## The machines\n", _machines(), "## The models\n", _models()]
    parts += ["## The plans\n", _plans_text(), _plans()]
    parts += ["## Against what others published\n", _others_text(), _others()]
    return "\n".join(parts)


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    head, *body = rows
    lines = [head, tuple("---" for _ in head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _machines() -> str:
    rows = [("class", "machine", "read from memory")]
    for name, machine in MACHINES.items():
        rows.append((name, MACHINE_OF[name], f"{machine.read_gb_per_s:.0f} GB/s"))
    return _table(rows)


def _models() -> str:
    rows = [("model", "billion weights", "for a token", "experts", "in GiB", "all else in GiB")]
    for published in MODELS:
        model = shape_of(published.name)
        rows.append(
            (
                published.name,
                f"{(model.routed + model.others) / 1e9:.1f}",
                f"{model.active / 1e9:.1f}",
                f"{model.bits.format}, {model.bits.experts:.2f} bits",
                f"{model.routed * model.bits.experts / 8 / GIB:.0f}",
                f"{model.others * model.bits.others / 8 / GIB:.1f}",
            )
        )
    return _table(rows)


def _plans_text() -> str:
    return """\
Tokens a second of the prompt and of the answer, and the way to run it: *GPU* or *CPU* (everything
is there), *streamed* (every batch's experts are copied to the GPU), *hybrid* (long prompts are
streamed, and answers take the experts on the CPU), or *experts* (only the experts are on the CPU,
for every batch). A dash: it does not fit. No weights are rounded.
"""


SHORT = {
    "everything on the CPU": "CPU",
    "everything on the GPU": "GPU",
    "every batch streamed": "streamed",
    "long prompts streamed": "hybrid",
    "experts on the CPU": "experts",
}


def _plans() -> str:
    rows: list[tuple[str, ...]] = [("model", *MACHINES)]
    for published in MODELS:
        model = shape_of(published.name)
        cells = []
        for machine in MACHINES.values():
            best = choose(model, machine, LOAD).best
            cells.append(
                f"{best.speed.prefill_rate:.0f} / {best.speed.decode_rate:.1f} {SHORT[best.name]}"
                if best
                else "-"
            )
        rows.append((published.name, *cells))
    return _table(rows)


def _others_text() -> str:
    return """\
What other engines' authors published about their own, in tokens a second of all users together, and
what this LvLLM is predicted to do there. The prompts, the memory's speed and often the GPU are not
published, and are assumed; so a factor of 1.5 says little. The last column is what limits LvLLM.
"""


def _others() -> str:
    head = ("what", "prompt", "", "published", "predicted", "ratio", "predicted limit")
    rows: list[tuple[str, ...]] = [head]
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
                rows.append((one.what, str(one.load.prompt), name, *numbers, limit(seconds)))
    return _table(rows)


if __name__ == "__main__":
    print(page(), end="")
