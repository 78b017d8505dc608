"""The results of a run as a table for the terminal, as JSON, as markdown and as a plot."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from benchmarks.cases import UserError
from benchmarks.measure import Rates, Result

BEGIN, END = "<!-- moe_block: begin -->", "<!-- moe_block: end -->"


@dataclass(frozen=True)
class Report:
    machine: dict[str, object]
    engines: dict[str, str]
    """The version of each engine that took part, or why it did not."""
    results: list[Result]
    rates: Rates

    def _rates(self) -> dict[str, object]:
        return {
            "read_gb_s": statistics.median(self.rates.read) / 1e9,
            "read_gb_s_range": [min(self.rates.read) / 1e9, max(self.rates.read) / 1e9],
            "matrix_gflop_s": statistics.median(self.rates.matrix) / 1e9,
        }

    def title(self) -> str:
        rates = self._rates()
        return (
            f"{self.machine['cpu']}, {self.machine['isa']}, {self.machine['threads']} threads; "
            f"read {rates['read_gb_s']:.1f} GB/s, matrix {rates['matrix_gflop_s']:.0f} GFLOP/s"
        )

    def json(self) -> str:
        content = {
            "machine": self.machine | self._rates(),
            "engines": self.engines,
            "results": [asdict(result) for result in self.results],
        }
        return json.dumps(content, indent=2) + "\n"

    def cells(self) -> dict[tuple[str, str], dict[str, dict[int, Result]]]:
        """The results by shape and format, then by engine, then by tokens."""
        cells: dict[tuple[str, str], dict[str, dict[int, Result]]] = {}
        for result in self.results:
            engines = cells.setdefault((result.shape, result.format), {})
            engines.setdefault(result.engine, {})[result.tokens] = result
        return cells


def table(report: Report) -> Table:
    view = Table(title=report.title(), box=None, padding=(0, 1), title_justify="left")
    columns = ("shape", "format", "tokens", "engine", "ms", "GB/s", "GFLOP/s", "roofline", "error")
    for name in columns:
        view.add_column(name, justify="right", no_wrap=True)
    for r in report.results:
        view.add_row(
            r.shape,
            r.format,
            str(r.tokens),
            r.engine,
            f"{r.ms:.3f}",
            f"{r.gb_s:.1f}",
            f"{r.gflop_s:.0f}",
            f"{r.roofline:.0%}",
            f"{r.error:.1e}",
        )
    return view


def _milliseconds(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def markdown(report: Report) -> str:
    """A table for each shape: milliseconds of a call, and in brackets percent of the roofline."""
    lines = [report.title() + ".", ""]
    versions = [f"{name} {version}" for name, version in report.engines.items()]
    lines += ["Engines: " + ", ".join(versions) + ".", ""]
    cells = report.cells()
    for shape in dict.fromkeys(shape for shape, _ in cells):
        mine = {format: engines for (s, format), engines in cells.items() if s == shape}
        tokens = sorted({t for engines in mine.values() for row in engines.values() for t in row})
        lines += [f"Shape {shape}, milliseconds of a call (percent of the roofline):", ""]
        lines.append("| format | engine | " + " | ".join(map(str, tokens)) + " |")
        lines.append("|---|---|" + "---:|" * len(tokens))
        for format, engines in mine.items():
            fastest = {
                t: min((row[t].ms for row in engines.values() if t in row), default=0.0)
                for t in tokens
            }
            for engine, row in engines.items():
                texts = []
                for t in tokens:
                    if t not in row:
                        texts.append("-")
                        continue
                    text = f"{_milliseconds(row[t].ms)} ({row[t].roofline * 100:.0f})"
                    texts.append(f"**{text}**" if row[t].ms == fastest[t] else text)
                lines.append(f"| {format} | {engine} | " + " | ".join(texts) + " |")
        lines.append("")
    return "\n".join(lines)


def write_markdown(report: Report, file: Path) -> None:
    """Write the tables between the markers of `file`, or into a new or empty file."""
    text = markdown(report)
    block = f"{BEGIN}\n\n{text}\n{END}\n"
    old = file.read_text() if file.exists() else ""
    if BEGIN not in old:
        if old:
            raise UserError(f"--markdown: {file} has no line {BEGIN}")
        file.write_text(block)
        return
    before, rest = old.split(BEGIN, 1)
    if END not in rest:
        raise UserError(f"--markdown: {file} has {BEGIN} without {END}")
    file.write_text(before + block + rest.split(END, 1)[1].removeprefix("\n"))


def plot(report: Report, file: Path) -> None:
    """Draw a chart for each shape and format. Each batch size has a bar for each engine."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cells = report.cells()
    names = list(dict.fromkeys(result.engine for result in report.results))
    columns = min(2, len(cells))
    rows = -(-len(cells) // columns)
    figure = Figure(figsize=(7 * columns, 0.8 + 3.2 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(report.title(), fontsize=10)
    for i, ((shape, format), engines) in enumerate(cells.items()):
        axes = figure.add_subplot(rows, columns, i + 1)
        tokens = sorted({t for row in engines.values() for t in row})
        width = 0.8 / len(engines)
        for j, (engine, row) in enumerate(engines.items()):
            places = [k + (j - (len(engines) - 1) / 2) * width for k, t in enumerate(tokens)]
            heights = [row[t].roofline if t in row else 0.0 for t in tokens]
            color = f"C{names.index(engine) % 10}"
            axes.bar(places, heights, width, label=engine, color=color)
        axes.axhline(1.0, color="black", linewidth=1, linestyle="--")
        axes.set_title(f"{shape} {format}", fontsize=10)
        axes.set_xticks(range(len(tokens)), [str(t) for t in tokens])
        axes.set_xlabel("tokens")
        axes.set_ylabel("share of the roofline")
        axes.legend(fontsize=8, ncols=2)
    figure.savefig(file, dpi=120)
