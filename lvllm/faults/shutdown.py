"""How a server stops: what its clients are told, and what it says of an engine that has died."""

import asyncio
import os
import signal
import threading
from collections.abc import Sequence
from http import HTTPStatus
from multiprocessing import connection
from typing import Any

from vllm.exceptions import GenerationError, GracefulHTTPError

from lvllm.faults import scratch

__all__ = [
    "ServerStopped",
    "end_open_requests",
    "end_with_the_coordinator",
    "note_a_death",
    "noted_death",
    "stop_at_once",
    "wait_for_a_death",
]

ENDING_SECONDS = 5
"""How long a process may take from the end of its pipes to its own."""

_death: str | None = None


class ServerStopped(GracefulHTTPError, GenerationError):
    """The error that ends the requests of a server that stops, with HTTP status 503.

    vLLM's generate() lets a GracefulHTTPError pass, and its streamed answers expect a
    GenerationError, so this is both.
    """

    def __init__(self) -> None:
        message = "the server was stopped before the answer was complete"
        GracefulHTTPError.__init__(self, message, HTTPStatus.SERVICE_UNAVAILABLE)
        self.status_code = HTTPStatus.SERVICE_UNAVAILABLE


def end_open_requests(engine: Any) -> None:
    """End all requests that are still open at vLLM's `AsyncLLM`, whose engine has ended.

    This may be called in any thread: vLLM shuts down in another one than that of its event loop.
    """
    handler: asyncio.Task[None] | None = getattr(engine, "output_handler", None)
    if handler is None:
        return  # It never had a request.
    loop = handler.get_loop()
    if not loop.is_closed():
        loop.call_soon_threadsafe(engine.output_processor.propagate_error, ServerStopped())


def note_a_death(engine: Any) -> None:
    """Note the process of vLLM's `AsyncLLM` that has died without having been asked to end."""
    global _death
    # An AsyncLLM whose construction failed has no engine core.
    resources = getattr(getattr(engine, "engine_core", None), "resources", None)
    manager = getattr(resources, "engine_manager", None)
    name = getattr(manager, "failed_proc_name", None)
    if manager is None or name is None or _death is not None:
        return
    _death = _line(name, manager.finished_procs().get(name))


def end_with_the_coordinator(client: Any) -> None:
    """End the engines of vLLM's `MPClient` when its coordinator has died, and note that.

    The death of its engines is what the client looks for. A coordinator that is asked to end comes
    after them.
    """
    resources = client.resources
    if resources.coordinator is None or resources.engine_manager is None:
        return
    coordinator = resources.coordinator.proc

    def wait() -> None:
        global _death
        connection.wait([coordinator.sentinel])
        if resources.engine_dead:
            return
        _death = _line(coordinator.name, _status(coordinator))
        for process in resources.engine_manager.processes:
            process.kill()

    threading.Thread(target=wait, name="lvllm-coordinator", daemon=True).start()


def wait_for_a_death(processes: Sequence[Any]) -> None:
    """Wait until all API servers, engines and coordinators of a server have ended.

    When one dies, the others are killed, and SystemExit says which one it was. With SIGTERM they
    would wait for each other for some seconds.
    """
    waiting: dict[Any, Any] = {process.sentinel: process for process in processes}
    while waiting:
        for sentinel in connection.wait(list(waiting)):
            ended = waiting.pop(sentinel)
            if (status := _status(ended)) == 0:
                continue
            for process in waiting.values():
                process.kill()
            raise SystemExit(f"lvllm: {_line(ended.name, status)}")


def _status(process: Any) -> int | None:
    """How a process has ended whose sentinel, a pipe that closes a little earlier, says so."""
    process.join(ENDING_SECONDS)
    status: int | None = process.exitcode
    return status


def _line(name: str, status: int | None) -> str:
    return f"the process {name} {_ended_by(status)}, so the server ends"


def noted_death() -> str | None:
    """A line about the process that has died; None if none has."""
    return _death


def _ended_by(status: int | None) -> str:
    if status is None or status >= 0:
        return f"has ended with status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"


def stop_at_once() -> None:
    """Until the server answers requests, let SIGTERM and SIGINT end this process at once.

    vLLM raises KeyboardInterrupt for them, which is lost where Python calls back from C code, and
    the server goes on. The other processes end with this one.
    """
    if threading.current_thread() is not threading.main_thread():
        return  # Only the main thread may set handlers, and only it gets signals.

    def stop(number: int, _frame: object) -> None:
        name = signal.Signals(number).name
        os.write(2, f"lvllm: {name} has stopped the start\n".encode())
        scratch.remove()
        os._exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
