"""Prints which share of the experts' reads a cache on the GPU saves, by its size and scheme.

    python -m benchmarks.expert_cache [--layers 48] [--experts 128] [--topk 8] [--mib 2.4]
        [--gbs 80] [--steps 4000] [--users 1,4]

Routing is made up with two skews (benchmarks/expert_cache/routing.py), and recorded from the demo
model. `planned` is what `lvllm plan` expects. The last column of a made-up table is the time to
read the experts of a step from host memory with the scheme `counted`, against all of them: `--mib`
is the size of an expert, `--gbs` the bandwidth. The time of the GPU's own experts is hidden behind
the CPU's, since its memory is ten times as fast.
"""

from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.expert_cache.routing import fitted_skew, made_up, recorded
from benchmarks.expert_cache.schemes import SCHEMES, Trace
from lvllm.evaluation import load_questions
from lvllm.planning.hits import saved
from lvllm.units import MIB

SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
TOKENS = 512
CHOSEN = (95, 72)
"""How many of 128 experts 512 tokens of a prompt choose, in two reports."""
TINY = Path(__file__).parents[2] / "examples" / "models" / "tiny-moe"
ANSWERS, ANSWER_TOKENS = 60, 24


def demo_model() -> Trace:
    """Record what the demo model reads when it answers questions."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    prompts = [question.prompt(tokenizer) for question in load_questions()[:ANSWERS]]
    return list(recorded(TINY, prompts, ANSWER_TOKENS))


def show(title: str, trace: Trace, users: int, seconds_of_read: float | None = None) -> None:
    """Print a table with the hits of each scheme."""
    reads = float(torch.stack(list(trace)).sum()) / len(trace)
    table = Table("of the experts", *SCHEMES, "planned", "ms a step", title=title)
    for share in SHARES:
        slots = int(share * trace[0].numel())
        hits = {name: scheme(trace, slots) for name, scheme in SCHEMES.items()}
        time = ""
        if seconds_of_read is not None:
            whole = 1e3 * reads * seconds_of_read
            time = f"{whole * (1 - hits['counted']):.1f} of {whole:.1f}"
        expected = (*hits.values(), saved(share, users))
        table.add_row(f"{share:.0%}", *(f"{hit:.0%}" for hit in expected), time)
    Console().print(table)


def main(
    layers: int = 48,
    experts: int = 128,
    topk: int = 8,
    mib: Annotated[float, typer.Option(help="the size of an expert")] = 2.4,
    gbs: Annotated[float, typer.Option(help="the bandwidth of host memory")] = 80,
    steps: int = 4000,
    users: str = "1,4",
    seed: int = 1,
) -> None:
    """Print which share of the experts' reads a cache on the GPU saves."""
    read = mib * MIB / (gbs * 1e9)
    for chosen in CHOSEN:
        skew = fitted_skew(128, 8, TOKENS, chosen)
        for count in map(int, users.split(",")):
            title = f"{TOKENS} tokens choose {chosen} of 128 (skew {skew:.2f}), {count} at a time"
            trace = list(made_up(layers, experts, topk, skew, count, steps, seed))
            show(title, trace, count, read)
    show(f"the demo model, {ANSWERS} answers", demo_model(), 1)


if __name__ == "__main__":
    typer.run(main)
