"""The table of an evaluation, for the terminal and for a markdown page."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from lvllm.evaluation.likelihood import Comparison, Likelihoods
from lvllm.evaluation.scoring import Result
from lvllm.units import gib

BEGIN = "<!-- lvllm eval: begin -->"
END = "<!-- lvllm eval: end -->"


@dataclass(frozen=True)
class Row:
    """What was measured for one model. Fields are None for what was not measured."""

    name: str
    expert_bytes: int | None = None
    result: Result | None = None
    likelihoods: Likelihoods | None = None
    comparison: Comparison | None = None


def cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headings, and a line of cells for each row. Columns without any value are left out."""
    heads = ["model", "experts", "exact match", "NLL", "perplexity", "same top-1", "KL divergence"]
    lines = [
        [
            row.name,
            _size(row.expert_bytes),
            f"{row.result.accuracy:.1%}" if row.result else "",
            f"{row.likelihoods.nll:.4f}" if row.likelihoods else "",
            f"{row.likelihoods.perplexity:.4g}" if row.likelihoods else "",
            f"{row.comparison.agreement:.2%}" if row.comparison else "",
            f"{row.comparison.divergence:.6f}" if row.comparison else "",
        ]
        for row in rows
    ]
    kept = [i for i in range(len(heads)) if any(line[i] for line in lines)]
    return [heads[i] for i in kept], [[line[i] for i in kept] for line in lines]


def _size(count: int | None) -> str:
    if not count:
        return ""
    return gib(count) if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def notes(rows: Sequence[Row], read: str, reference: str) -> list[str]:
    """Sentences below the table that say what its columns mean in this run."""
    found = []
    scored = next((len(row.likelihoods.logprobs) for row in rows if row.likelihoods), 0)
    if scored:
        found.append(f"NLL in nats a token, over {scored} tokens of {read}.")
    comparison = next((row.comparison for row in rows if row.comparison), None)
    if comparison:
        how = f"exact, over the whole vocabulary of {comparison.listed} tokens"
        if not comparison.exact:
            how = (
                f"from the {comparison.listed} most probable tokens of each model, which have"
                f" {comparison.covered:.2%} of the probability, and all others as one: a lower"
                " bound"
            )
        found.append(f"KL divergence from {reference} in nats a token: {how}.")
    return found


def table(rows: Sequence[Row]) -> Table:
    """The table for the terminal."""
    heads, lines = cells(rows)
    made = Table()
    for i, head in enumerate(heads):
        made.add_column(head, justify="left" if i == 0 else "right", no_wrap=i == 0)
    for line in lines:
        made.add_row(*line)
    return made


def markdown(rows: Sequence[Row], about: Sequence[str]) -> str:
    """The table in markdown, and below it the lines of `about`."""
    heads, lines = cells(rows)
    rule = ["---", *["---:"] * (len(heads) - 1)]
    text = "\n".join(f"| {' | '.join(line)} |" for line in (heads, rule, *lines))
    return "\n".join([text, "", *about])


def split_page(page: Path) -> tuple[str, str]:
    """The text of `page` before and after its table. A page that does not exist yet has none.

    Raises ValueError if the page has no markers for the table, OSError if it cannot be read.
    """
    if not page.exists():
        if not page.parent.is_dir():
            raise ValueError(f"{page.parent} is no folder")
        return "", "\n"
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} has no lines {BEGIN} and {END} for the table to stand between")
    return before, after


def write_page(page: Path, text: str) -> None:
    """Put `text` between the markers of `page`."""
    before, after = split_page(page)
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
