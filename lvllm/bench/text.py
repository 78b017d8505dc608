"""Results as people read them."""

from collections.abc import Sequence

from rich.box import SIMPLE
from rich.table import Table

from lvllm.bench.comparison import Row
from lvllm.bench.speed import Percentiles

__all__ = ["latency_table", "prefill_table", "rates_table"]


def prefill_table(rows: Sequence[Row]) -> Table:
    """How fast a prompt is that is alone on the server."""
    alone = [row for row in rows if row.measured.prefill_rate is not None]
    table = _table("A prompt that is alone, tokens/s", ["prompt", "prefill"], alone)
    for row in alone:
        one, plan, stock = row.measured, row.planned, row.stock
        cells = [str(one.prompt), _rate(one.prefill_rate)]
        if plan:
            cells += _compared(one.prefill_rate, plan.prefill_rate)
        if stock:
            cells += _compared(one.prefill_rate, stock.prefill_rate)
        table.add_row(*cells)
    return table


def rates_table(rows: Sequence[Row]) -> Table:
    """Tokens of answers a second: in all, and while nothing but answers is computed."""
    table = _table("Answers, tokens/s of all users", ["prompt", "users", "in all", "decode"], rows)
    for row in rows:
        one, plan, stock = row.measured, row.planned, row.stock
        cells = [str(one.prompt), str(one.users), _rate(one.output_rate), _rate(one.decode_rate)]
        if plan:
            cells += _compared(one.decode_rate, plan.decode_rate)
        if stock:
            cells += _compared(one.decode_rate, stock.decode_rate)
        table.add_row(*cells)
    return table


def latency_table(rows: Sequence[Row]) -> Table:
    """What a user waits for: the median and the 99th percentile."""
    title = "Seconds, median / 99th percentile"
    table = _table(title, ["prompt", "users", "first token", "next tokens", "whole answer"], ())
    for row in rows:
        one = row.measured
        spans = (one.first_token, one.between_tokens, one.whole)
        table.add_row(str(one.prompt), str(one.users), *map(_span, spans))
    return table


def _table(title: str, names: list[str], rows: Sequence[Row]) -> Table:
    if any(row.planned for row in rows):
        names = [*names, "planned", "of it"]
    if any(row.stock for row in rows):
        names = [*names, "stock vLLM", "times it"]
    table = Table(title=title, title_justify="left", box=SIMPLE, title_style="")
    for name in names:
        table.add_column(name, justify="right")
    return table


def _compared(seen: float | None, other: float | None) -> list[str]:
    """Another rate, and how many times it the one that was seen is."""
    known = seen is not None and other is not None
    return [_rate(other), f"{seen / other:.2f}" if known else "-"]  # type: ignore[operator]


def _rate(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _span(some: Percentiles) -> str:
    return f"{some.p50:.3f} / {some.p99:.3f}"
