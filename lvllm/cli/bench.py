"""`lvllm bench`: how fast a model is here, beside what was planned and beside stock vLLM."""

import importlib.util
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.markup import escape

from lvllm.bench.comparison import RIGHT, Report, Row, misses, planned
from lvllm.bench.load import BenchError, Endpoint, LoadGenerator
from lvllm.bench.logs import log_folder
from lvllm.bench.measure import Grid, measure
from lvllm.bench.plot import plot as draw
from lvllm.bench.servers import launch_for, measured
from lvllm.bench.servers import stock as without_lvllm
from lvllm.bench.speed import Result
from lvllm.bench.text import latency_table, prefill_table, rates_table
from lvllm.cli.measuring import this_machine
from lvllm.cli.numbers import numbers
from lvllm.cli.serving_arguments import CONTEXT, Arguments
from lvllm.errors import LvllmError
from lvllm.serving.launch import Launch

__all__ = ["CONTEXT", "bench"]

KINDS = (".png", ".svg", ".pdf")
PROMPTS = (512, 2048)
"""Tokens of prompts, if the user says nothing."""


def bench(
    arguments: Arguments = None,
    users: Annotated[
        str, typer.Option(parser=numbers, metavar="N,N", help="Requests at a time.")
    ] = "1,4,16",
    prompt: Annotated[
        str | None,
        typer.Option(
            parser=numbers, metavar="N,N", help="Tokens of a prompt; 512,2048 if they fit."
        ),
    ] = None,
    answer: Annotated[int, typer.Option(min=2, help="Tokens of an answer.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Requests of each user.")] = 2,
    url: Annotated[
        str | None, typer.Option(help="Measure a running server instead of starting one.")
    ] = None,
    stock: Annotated[
        bool,
        typer.Option("--stock", help="Measure vLLM without LvLLM as well, with these weights."),
    ] = False,
    stock_arguments: Annotated[
        str, typer.Option(help="More arguments for that: '--cpu-offload-gb 40'.")
    ] = "",
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the results: a .png, .svg or .pdf.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure tokens per second and latencies of a model, and hold them against the plan.

    The model is served as `lvllm serve` does it, with the same arguments, and `vllm bench serve`
    sends the requests. docs/bench.md says how each number is measured.
    """
    words = arguments or []
    if plot is not None:
        _check_plot(plot)
    if url is not None and (stock or len(words) > 1):
        raise SystemExit("lvllm: with --url, a server runs already: name the model at most")
    counts, prompts = cast(tuple[int, ...], users), cast(tuple[int, ...] | None, prompt)
    console = Console(stderr=True, highlight=False)
    try:
        with log_folder("lvllm-bench-") as logs:
            if url is not None:
                grid = Grid(prompts or PROMPTS, counts, answer, rounds)
                to = Endpoint(url.rstrip("/").removesuffix("/v1"), next(iter(words), None))
                with LoadGenerator(logs / "load.log", _key({})) as load, _progress(console) as say:
                    rows = [Row(measured=one) for one in measure(load, to, grid, say)]
                name = to.model or ""
                report = Report(model=name, server=to.url, way=None, machine=None, rows=rows)
            else:
                launch = launch_for(words, os.environ, this_machine, max(counts))
                for note in launch.notes:
                    _say(console, note)
                _say(console, f"logs are in {logs}")
                grid = Grid(prompts or _fitting(launch, answer), counts, answer, rounds)
                with LoadGenerator(logs / "load.log", _key(launch.given.options)) as load:
                    rows = _compared(console, load, launch, grid, logs, stock, stock_arguments)
                best = launch.plan and launch.plan.best
                report = Report(
                    model=str(launch.given.model),
                    server=shlex.join(launch.command),
                    way=best.name if best else None,
                    machine=launch.plan.machine if launch.plan else None,
                    rows=rows,
                )
        _show(report, as_json)
        if plot is not None:
            _draw(report, plot)
    except LvllmError as error:
        raise SystemExit(f"lvllm: {error}") from None


def _check_plot(file: Path) -> None:
    """Say at once what would be said after half an hour."""
    if importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("lvllm: --plot needs matplotlib: pip install matplotlib")
    if file.suffix not in KINDS:
        raise SystemExit(f"lvllm: --plot {file}: the name has to end with {', '.join(KINDS)}")
    if not file.parent.is_dir():
        raise SystemExit(f"lvllm: --plot {file}: there is no folder {file.parent}")


def _key(options: Mapping[str, Any]) -> str:
    """The key that the server asks for, if it asks for one."""
    environ = os.environ
    found = options.get("api-key") or environ.get("VLLM_API_KEY") or environ.get("OPENAI_API_KEY")
    return str(found or "")


def _fitting(launch: Launch, answer: int) -> tuple[int, ...]:
    """The usual prompts that fit into the planned context beside an answer."""
    if launch.plan is None or launch.plan.best is None:
        return PROMPTS
    longest = launch.plan.best.load.context - answer
    if longest < 1:
        raise BenchError(f"--answer {answer}: the context has {longest + answer} tokens")
    return tuple(prompt for prompt in PROMPTS if prompt <= longest) or (longest,)


def _compared(
    console: Console,
    load: LoadGenerator,
    launch: Launch,
    grid: Grid,
    logs: Path,
    stock: bool,
    stock_arguments: str,
) -> list[Row]:
    with _progress(console) as say:
        results = measured(launch, load, grid, logs / "lvllm.log", say)
    others: list[Result | None] = [None] * len(results)
    if stock:
        try:
            other = without_lvllm(launch, stock_arguments)
            with _progress(console, "stock vLLM: ") as say:
                others = [*measured(other, load, grid, logs / "stock.log", say)]
        except LvllmError as error:
            _say(console, f"stock vLLM is not measured: {error}")
    return [
        Row(measured=one, planned=planned(launch.plan, one), stock=other)
        for one, other in zip(results, others, strict=True)
    ]


@contextmanager
def _progress(console: Console, name: str = "") -> Iterator[Callable[[str], None]]:
    """A function that shows what is done now, in a terminal."""
    with console.status("") as status:
        yield lambda text: status.update(f"{name}{escape(text[-100:])}")


def _show(report: Report, as_json: bool) -> None:
    """Print the results."""
    rows = report.rows
    if as_json:
        print(report.model_dump_json(indent=2), flush=True)
        return
    tables = Console(highlight=False)
    for table in (prefill_table(rows), rates_table(rows), latency_table(rows)):
        if table.row_count:
            tables.print(table)
    if any(row.planned for row in rows):
        wrong = misses(rows)
        print("\n".join(wrong) or f"Every rate is within {RIGHT:.0%} of the plan.")
        if wrong:
            print("If nothing else runs here, this is a bug: report it with `lvllm doctor`.")
    sys.stdout.flush()


def _draw(report: Report, file: Path) -> None:
    try:
        draw(file, report)
    except (OSError, ValueError) as error:
        raise BenchError(f"--plot {file}: {error}") from None


def _say(console: Console, note: str) -> None:
    console.print(f"lvllm: {note}", markup=False, soft_wrap=True)
