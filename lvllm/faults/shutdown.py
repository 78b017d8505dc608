"""How a server stops: what its clients are told, and what it says of an engine that has died."""

import asyncio
import os
import queue
import signal
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from http import HTTPStatus
from multiprocessing import connection, resource_tracker
from typing import Any, NoReturn

import psutil
from vllm.exceptions import GenerationError, GracefulHTTPError
from vllm.v1.engine.exceptions import EngineDeadError

from lvllm.faults import scratch
from lvllm.faults.leaving import end_in_a_line
from lvllm.faults.process import report, reported
from lvllm.log import logger

__all__ = [
    "ServerStopped",
    "end_calls_with_the_engine",
    "end_open_requests",
    "end_with_the_coordinator",
    "end_workers",
    "ended_by_a_signal",
    "note_a_death",
    "noted_death",
    "report_a_death",
    "stop_at_once",
    "stopped_by_signals",
    "wait_for_a_death",
]

ENDING_SECONDS = 5
"""How long a process may take from the end of its pipes to its own."""

_death: str | None = None
_was_shut_down = False


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
    """Note why vLLM's `AsyncLLM` is shut down, unless this process was asked for it by a signal.

    After a signal, vLLM shuts it down in another thread than the main one. The engine may have got
    the signal as well, and have ended before.
    """
    global _death, _was_shut_down
    # An AsyncLLM whose construction failed has no engine core.
    resources: Any = getattr(getattr(engine, "engine_core", None), "resources", None)
    manager = getattr(resources, "engine_manager", None)
    if manager is None or _was_shut_down or _death is not None:
        return
    _was_shut_down = True  # From now on, vLLM calls its engine dead.
    ended: dict[str, int] = getattr(manager, "finished_procs", dict)()  # Ray's manager has none.
    name = manager.failed_proc_name
    if name is None and resources.engine_dead and _in_main_thread():
        # An engine that was sent SIGTERM ends with status 0, which vLLM calls no failure. One that
        # has lost a worker tells its client, and may still be there.
        name = next(iter(ended), None)
        _death = "the engine has met an error, which the log names, so the server ends"
    if name is not None:
        _death = _line(name, ended.get(name))
    if _death is not None:
        _death = reported() or _death  # The engine may have ended for a worker's death.


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


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


def end_calls_with_the_engine(client: Any) -> None:
    """Let what waits for the engine of vLLM's `MPClient` fail once the engine has ended.

    vLLM refuses calls from then on, and waits for ever for the results of earlier ones. A server
    makes its last ones shortly before it answers requests. `LLM.generate` waits for outputs in a
    queue into which nobody puts the engine's end.
    """
    resources, calls = client.resources, client.utility_results
    manager = resources.engine_manager
    processes = getattr(manager, "processes", None)
    if not processes:  # Ray's actors are no processes of this host.
        return
    weak = weakref.ref(client)

    def wait() -> None:
        connection.wait([process.sentinel for process in processes])
        while not resources.engine_dead:  # A thread of vLLM sets it; until then, calls may come.
            time.sleep(0.05)
        for call in list(calls.values()):
            _fail(call)
        outputs = getattr(weak(), "outputs_queue", None)
        if not isinstance(outputs, queue.Queue):  # vLLM ends the requests of a server by itself.
            return
        if (name := manager.failed_proc_name) is not None:  # It was not asked to end.
            death = _ended_by(manager.finished_procs().get(name))
            logger.error("LvLLM: the process %s %s", name, death)
        outputs.put_nowait(EngineDeadError())

    threading.Thread(target=wait, name="lvllm-calls", daemon=True).start()


def _fail(call: Any) -> None:
    """End a future of asyncio or, in a client without an event loop, of concurrent.futures."""

    def fail() -> None:
        if not call.done():
            call.set_exception(EngineDeadError())

    if not isinstance(call, asyncio.Future):
        fail()
    elif not call.get_loop().is_closed():
        call.get_loop().call_soon_threadsafe(fail)


def wait_for_a_death(processes: Sequence[Any]) -> NoReturn:
    """Wait until one of a server's processes, or of a headless node's workers, has ended.

    None of them ends by itself, and one that was sent SIGTERM ends with status 0. The others are
    killed, and the line says which one it was. With SIGTERM they would wait for each other for
    some seconds.
    """
    waiting: dict[Any, Any] = {process.sentinel: process for process in processes}
    ended = waiting.pop(connection.wait(list(waiting))[0])
    status = _status(ended)
    for process in waiting.values():
        process.kill()
    end_in_a_line(f"lvllm: {_line(ended.name, status)}")


def end_workers(processes: Sequence[Any], seconds: float) -> None:
    """Wait until workers that were asked to end have ended, and kill the others.

    A worker that waits for another one, in a call of C++, does not see that it was asked.
    """
    until = time.monotonic() + seconds
    for process in processes:
        process.join(max(0, until - time.monotonic()))
    for process in processes:
        process.kill()  # This does nothing to one that has ended.


def report_a_death(executor: Any) -> None:
    """Let the front process name the first worker of an executor that a signal ends.

    vLLM's own watch of the workers marks the executor as failed and shuts it down meanwhile.
    """
    processes = [worker.proc for worker in executor.workers]
    weak = weakref.ref(executor)

    def wait() -> None:
        connection.wait([process.sentinel for process in processes])
        death, executor = ended_by_a_signal(processes), weak()
        if death is None or executor is None:
            return
        if executor.is_failed or not getattr(executor, "shutting_down", False):
            report(death)

    threading.Thread(target=wait, name="lvllm-workers", daemon=True).start()


def ended_by_a_signal(processes: Sequence[Any]) -> str | None:
    """Once one of the processes has ended, a line about it if a signal has ended it, else None."""
    of_sentinels = {process.sentinel: process for process in processes}
    for sentinel in connection.wait(of_sentinels, ENDING_SECONDS):
        process = of_sentinels[sentinel]
        if (_status(process) or 0) < 0:
            return _line(process.name, process.exitcode)
    return None


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
    if not _in_main_thread():
        return  # Only the main thread may set handlers, and only it gets signals.

    def stop(number: int, _frame: object) -> None:
        name = signal.Signals(number).name
        os.write(2, f"lvllm: {name} has stopped the start\n".encode())
        # Who looks for the others meanwhile would find the folder gone, and say so or wait for it.
        _kill_descendants()
        scratch.remove()
        os._exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)


def _kill_descendants() -> None:
    """Kill all processes that this one has started, and those that these have.

    Python's tracker of resources stays: it removes what others leave in /dev/shm, and ends then.
    """
    tracker = getattr(getattr(resource_tracker, "_resource_tracker", None), "_pid", None)
    for process in psutil.Process().children(recursive=True):
        if process.pid != tracker:
            with suppress(psutil.NoSuchProcess):
                process.kill()


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Let the kernel end this process by SIGTERM and SIGINT, as those that it has started then do.

    vLLM's handlers for an engine note a signal, and have it end once the model is loaded.
    """
    numbers = (signal.SIGTERM, signal.SIGINT) if _in_main_thread() else ()
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
