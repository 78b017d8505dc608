"""The servers that are measured: LvLLM's as `lvllm serve` starts it, and stock vLLM beside it."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lvllm.bench.load import BenchError, Endpoint, LoadGenerator
from lvllm.bench.measure import Grid, measure
from lvllm.bench.speed import Result
from lvllm.planning.machine import Machine
from lvllm.planning.settings import LEAST_SEQUENCES
from lvllm.serving import given as user
from lvllm.serving.background import free_port, running
from lvllm.serving.launch import Launch, prepare

__all__ = ["launch_for", "measured", "stock"]

HOST = "127.0.0.1"
NO_CACHE = "--no-enable-prefix-caching"
"""A prompt that begins like an earlier one would be measured as a shorter one."""


def launch_for(
    words: Sequence[str], environ: Mapping[str, str], here: Callable[[], Machine], users: int
) -> Launch:
    """How `lvllm serve` starts a server for these arguments, with room for so many users.

    Raises what `lvllm.serving.launch.prepare` raises.
    """
    given = user.read(words, environ).options
    room = users > LEAST_SEQUENCES and "max-num-seqs" not in given
    launch = prepare([*words, *(["--max-num-seqs", str(users)] * room)], environ, here)
    if {"enable-prefix-caching", "no-enable-prefix-caching"} & set(given):
        return launch
    return replace(launch, command=[*launch.command, NO_CACHE])


def stock(launch: Launch, arguments: str) -> Launch:
    """The same server without LvLLM: vLLM's own options stay, and `arguments` come behind them."""
    own = {
        name: value
        for name, value in launch.environment.items()
        if not name.startswith(("LVLLM_", "LK_"))
    }
    environment = own | {"LVLLM_MOE_NUMA_ENABLED": "0"}
    try:
        more = shlex.split(arguments)
    except ValueError as error:
        raise BenchError(f"--stock-arguments {arguments!r}: {error}") from None
    return replace(launch, command=[*launch.command, *more], environment=environment, notes=[])


def measured(
    launch: Launch,
    load: LoadGenerator,
    grid: Grid,
    log: Path,
    say: Callable[[str], None],
    also: Callable[[Endpoint], None] | None = None,
) -> list[Result]:
    """Start a server on a free port of this machine, measure it, and stop it.

    Args:
        log: where the server's output goes.
        say: is told what happens now.
        also: what else is done with the server before it stops.

    Raises:
        ServerError: if the server does not start.
        BenchError: if a request fails.
    """
    url = f"http://{HOST}:{(port := free_port())}"
    command = [*launch.command, "--host", HOST, "--port", str(port)]
    served, tokenizer = map(launch.given.options.get, ("served-model-name", "tokenizer"))
    to = Endpoint(
        url,
        launch.given.model,
        None if served is None else str(served),
        None if tokenizer is None else str(tokenizer),
        trust=bool(launch.given.options.get("trust-remote-code")),
    )
    with running(replace(launch, command=command), url, log, say):
        results = measure(load, to, grid, say)
        if also is not None:
            also(to)
        return results
