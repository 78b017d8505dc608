"""Requests that are open when a server stops."""

import asyncio
import multiprocessing
import os
import signal
import tempfile
import time
from concurrent.futures import Future
from queue import Empty, Queue
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.v1.engine.exceptions import EngineDeadError

from lvllm.faults import scratch, shutdown
from lvllm.faults.shutdown import (
    ServerStopped,
    end_calls_with_the_engine,
    end_open_requests,
    end_workers,
    note_a_death,
    noted_death,
)
from lvllm.patches import failures


def test_the_client_sees_status_503() -> None:
    response = create_error_response(ServerStopped())
    assert response.error.code == 503
    assert response.error.message == "the server was stopped before the answer was complete"


def test_open_requests_are_told_in_the_thread_of_the_event_loop() -> None:
    told: list[tuple[Exception, object]] = []

    async def serve() -> asyncio.Task[None]:
        task = asyncio.create_task(asyncio.sleep(60))
        processor = SimpleNamespace(
            propagate_error=lambda error: told.append((error, asyncio.get_running_loop()))
        )
        engine = SimpleNamespace(output_handler=task, output_processor=processor)
        await asyncio.to_thread(end_open_requests, engine)
        await asyncio.sleep(0)
        ((error, loop),) = told
        assert isinstance(error, ServerStopped)
        assert loop is asyncio.get_running_loop()
        task.cancel()
        return task

    task = asyncio.run(serve())
    # Once more, as an interpreter that ends does it, without a loop.
    end_open_requests(SimpleNamespace(output_handler=task, output_processor=None))
    end_open_requests(SimpleNamespace(output_handler=None))
    assert len(told) == 1


@pytest.fixture(autouse=True)
def nothing_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutdown, "_death", None)
    monkeypatch.setattr(shutdown, "_was_shut_down", False)


def engine(dead: bool, failed: str | None = None, **ended: int) -> SimpleNamespace:
    """What is looked at of vLLM's AsyncLLM."""
    manager = SimpleNamespace(failed_proc_name=failed, finished_procs=lambda: ended)
    resources = SimpleNamespace(engine_dead=dead, engine_manager=manager)
    return SimpleNamespace(engine_core=SimpleNamespace(resources=resources))


@pytest.mark.parametrize(
    ("stopped", "said"),
    [
        (engine(False), None),
        (engine(True), "the engine has met an error, which the log names, so the server ends"),
        (engine(True, E=0), "the process E has ended with status 0, so the server ends"),
        (engine(True, "E", E=-9), "the process E was ended by SIGKILL, so the server ends"),
        (SimpleNamespace(), None),
    ],
)
def test_who_died(stopped: SimpleNamespace, said: str | None) -> None:
    note_a_death(stopped)
    assert noted_death() == said
    if hasattr(stopped, "engine_core"):
        note_a_death(engine(True))  # It may be shut down twice.
        assert noted_death() == said


def test_an_engine_that_gets_the_servers_signal_has_not_died() -> None:
    """A terminal and systemd send it to all processes, and vLLM stops in another thread then."""
    thread = Thread(target=note_a_death, args=(engine(True, E=0),))
    thread.start()
    thread.join()
    assert noted_death() is None


class Client:
    """What vLLM's client of an engine has. One without an event loop has a queue of outputs."""

    def __init__(self, resources: Any, calls: dict[int, Any]) -> None:
        self.resources, self.utility_results = resources, calls
        self.outputs_queue: Queue[Any] = Queue()


def test_outputs_end_with_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """`LLM.generate` waits for outputs of an engine that is killed."""
    said: list[str] = []
    monkeypatch.setattr(shutdown.logger, "error", lambda text, *of: said.append(text % of))
    process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,), name="E")
    process.start()
    manager = SimpleNamespace(processes=[process], failed_proc_name=None)
    manager.finished_procs = lambda: {"E": process.exitcode}
    resources = SimpleNamespace(engine_manager=manager, engine_dead=False)
    client = Client(resources, {})
    end_calls_with_the_engine(client)
    with pytest.raises(Empty):
        client.outputs_queue.get(timeout=0.2)
    process.kill()
    process.join()
    manager.failed_proc_name, resources.engine_dead = "E", True
    assert isinstance(client.outputs_queue.get(timeout=60), EngineDeadError)
    assert said == ["LvLLM: the process E was ended by SIGKILL"]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_calls_fail_with_the_engine(asynchronous: bool) -> None:
    """Calls that are open when the engine's process ends."""

    async def ask() -> Exception | None:
        loop = asyncio.get_running_loop()
        call: Any = loop.create_future() if asynchronous else Future()
        answered: Any = loop.create_future() if asynchronous else Future()
        answered.set_result(1)
        process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(0.1,))
        process.start()
        manager = SimpleNamespace(processes=[process], failed_proc_name=None)
        resources = SimpleNamespace(engine_manager=manager, engine_dead=False)
        client = Client(resources, {1: answered, 2: call})
        end_calls_with_the_engine(client)
        await asyncio.to_thread(process.join)
        assert not call.done()
        resources.engine_dead = True
        await asyncio.wait([call if asynchronous else asyncio.wrap_future(call)], timeout=60)
        assert answered.result() == 1
        found: Exception | None = call.exception()
        return found

    assert isinstance(asyncio.run(ask()), EngineDeadError)


def test_an_idle_server_notices_that_its_engine_has_died(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before vLLM's own loop would look for the first time, after 5 s, on a clock of its own."""
    slept, sleep = 0.0, asyncio.sleep

    async def pretend(seconds: float) -> None:
        nonlocal slept
        slept += seconds
        await sleep(0)

    monkeypatch.setattr(failures, "asyncio", SimpleNamespace(sleep=pretend))
    server = SimpleNamespace(should_exit=False)
    engine = SimpleNamespace(errored=False, is_running=True)
    watch = failures.notice_a_death_soon.make(None)

    async def die() -> None:
        watching = asyncio.create_task(watch(server, engine))
        while slept < 0.6:
            await sleep(0)
        assert not server.should_exit
        engine.errored, engine.is_running = True, False
        while not server.should_exit:
            await sleep(0)
        watching.cancel()

    asyncio.run(die())
    assert slept < 4


def test_a_worker_that_stays_is_killed_and_one_that_ends_is_waited_for() -> None:
    context = multiprocessing.get_context("fork")
    ending = context.Process(target=time.sleep, args=(1,))
    staying = context.Process(target=time.sleep, args=(60,))
    for process in (staying, ending):
        process.start()
    end_workers([staying, ending], 3)
    for process in (staying, ending):
        process.join()
    assert (staying.exitcode, ending.exitcode) == (-signal.SIGKILL, 0)


FORK = multiprocessing.get_context("fork")


def look(folder: str, out: int) -> None:
    """As a worker that finds others in the folder."""
    os.write(out, b"looks ")
    while os.path.isdir(folder):
        pass
    os.write(out, b"gone ")


def start(folder: str, out: int) -> None:
    """As an engine."""
    worker = FORK.Process(target=look, args=(folder, out))
    worker.start()
    worker.join()


def front(parent: str, out: int) -> None:
    """As a server's first process, while it starts."""
    for variable in ("VLLM_RPC_BASE_PATH", "_LVLLM_SCRATCH"):
        os.environ.pop(variable, None)
    tempfile.tempdir = parent
    os.dup2(out, 2)
    scratch.prepare()
    FORK.Process(target=start, args=(os.environ["VLLM_RPC_BASE_PATH"], out)).start()
    shutdown.stop_at_once()
    os.write(out, b"starts ")
    time.sleep(60)


def test_the_servers_folder_goes_after_all_who_may_look_for_it() -> None:
    """Where ranks meet. A worker that found it gone would say so, or wait for it."""
    reading, writing = os.pipe()
    with tempfile.TemporaryDirectory(dir="/tmp") as folder, open(reading, "rb") as said:
        process = FORK.Process(target=front, args=(folder, writing))
        process.start()
        os.close(writing)
        begun = b"".join(said.read(1) for _ in range(len("looks starts ")))
        assert sorted(begun.split()) == [b"looks", b"starts"]
        process.terminate()
        assert said.read() == b"lvllm: SIGTERM has stopped the start\n"
        process.join()
        assert process.exitcode == 128 + signal.SIGTERM
        assert os.listdir(folder) == []
