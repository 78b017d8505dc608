"""Requests that are open when a server stops."""

import asyncio
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

from lvllm.faults.shutdown import ServerStopped, end_open_requests


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
