"""Results as a picture."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lvllm.bench.comparison import Report, Row

__all__ = ["plot"]


def plot(file: Path, report: Report) -> None:
    """Draw decoding, prefill and latencies into a file of a kind that matplotlib knows.

    Raises:
        ValueError: for an ending that matplotlib does not know.
        OSError: if the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = report.rows
    figure = Figure(figsize=(11, 8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(report.title, fontsize=10)
    decode, prefill, first, between = figure.subplots(2, 2).flat
    _prefill(prefill, rows)
    for i, prompt in enumerate(dict.fromkeys(row.measured.prompt for row in rows)):
        some = [row for row in rows if row.measured.prompt == prompt]
        _decode(decode, some, f"C{i}", f"behind {prompt} tokens")
        _latency(first, some, f"C{i}", f"{prompt} tokens", "first_token")
        _latency(between, some, f"C{i}", f"{prompt} tokens", "between_tokens")
    for axes, name, unit in (
        (prefill, "a prompt that is alone, tokens/s", "tokens of the prompt"),
        (decode, "decode, tokens/s of all users", "users"),
        (first, "seconds to the first token", "users"),
        (between, "seconds from token to token", "users"),
    ):
        at = sorted({r.measured.prompt if axes is prefill else r.measured.users for r in rows})
        axes.set_xscale("log", base=2)
        axes.set_xticks(at, [str(number) for number in at])
        axes.set_title(name, fontsize=10)
        axes.set_xlabel(unit)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    figure.savefig(file, dpi=120)


def _prefill(axes: Any, rows: Sequence[Row]) -> None:
    alone = [row for row in rows if row.measured.prefill_rate is not None]
    _line(axes, ((r.measured.prompt, r.measured.prefill_rate) for r in alone), "C0o-", "measured")
    planned = ((r.measured.prompt, r.planned.prefill_rate) for r in alone if r.planned)
    _line(axes, planned, "C0--", "planned")
    stock = ((r.measured.prompt, r.stock.prefill_rate) for r in alone if r.stock)
    _line(axes, stock, "C0s:", "stock vLLM")


def _decode(axes: Any, rows: Sequence[Row], color: str, name: str) -> None:
    measured = ((r.measured.users, r.measured.decode_rate) for r in rows)
    _line(axes, measured, f"{color}o-", name)
    planned = ((r.measured.users, r.planned.decode_rate) for r in rows if r.planned)
    _line(axes, planned, f"{color}--", f"{name}, planned")
    stock = ((r.measured.users, r.stock.decode_rate) for r in rows if r.stock)
    _line(axes, stock, f"{color}s:", f"{name}, stock vLLM")


def _latency(axes: Any, rows: Sequence[Row], color: str, name: str, field: str) -> None:
    seen = [(row.measured.users, getattr(row.measured, field)) for row in rows]
    _line(axes, ((users, some.p50) for users, some in seen), f"{color}o-", f"{name}, median")
    _line(axes, ((users, some.p99) for users, some in seen), f"{color}^:", f"{name}, 99%")


def _line(axes: Any, points: Iterable[tuple[int, float | None]], style: str, label: str) -> None:
    """Draw the points that have a value, if there are any. `style` begins with a color, C0."""
    known = [point for point in points if point[1] is not None]
    if known:
        axes.plot(*zip(*known, strict=True), style[2:], color=style[:2], label=label)
