"""`lvllm top`: what a server is doing, live."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console, RenderableType
from rich.live import Live

from lvllm.top.rates import between
from lvllm.top.routing import routing
from lvllm.top.scrape import Scrape, TopError, scrape
from lvllm.top.view import experts_view, view


def top(
    url: Annotated[str, typer.Option(help="The server, without a path.")] = "http://127.0.0.1:8000",
    interval: Annotated[
        float, typer.Option(min=0.1, max=3600, help="Seconds between two looks.")
    ] = 1.0,
    once: Annotated[
        bool, typer.Option("--once", help="Look for one interval, print, and end.")
    ] = False,
    experts: Annotated[
        bool,
        typer.Option(
            "--experts",
            help="Show which experts the tokens go to; needs a server with"
            " LVLLM_METRICS_EXPERTS=1.",
        ),
    ] = False,
    bandwidth: Annotated[
        float | None,
        typer.Option(min=0.1, help="GB/s that the machine reads, as `lvllm doctor` measures it."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --once: print JSON.")] = False,
) -> None:
    """Show the requests of a server, and what its experts do on each path.

    The numbers are those of /metrics; docs/metrics.md explains them. Ctrl+C ends it. In a pipe it
    prints once.
    """
    if as_json and not once:
        raise SystemExit("lvllm: --json needs --once")
    console = Console()
    live = console.is_terminal and not once

    def show(before: Scrape, now: Scrape) -> RenderableType:
        if experts:
            return experts_view(url, routing(now), console.width, console.height if live else None)
        return view(url, between(before, now), bandwidth)

    try:
        before = scrape(url)
        if live:
            _watch(console, url, before, interval, show)
        else:
            now = before if experts else _later(url, interval)
            if as_json:
                found = routing(now).layers if experts else asdict(between(before, now))
                print(json.dumps(found, indent=2))
            else:
                console.print(show(before, now))
    except TopError as error:
        raise SystemExit(f"lvllm: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130 if once else 0) from None
    sys.stdout.flush()


def _later(url: str, interval: float) -> Scrape:
    time.sleep(interval)
    return scrape(url)


def _watch(
    console: Console,
    url: str,
    before: Scrape,
    interval: float,
    show: Callable[[Scrape, Scrape], RenderableType],
) -> None:
    """Show one picture after the other until the user or the server ends."""
    with Live(show(before, before), console=console, screen=True, auto_refresh=False) as live:
        while True:
            now = _later(url, interval)
            live.update(show(before, now), refresh=True)
            before = now
