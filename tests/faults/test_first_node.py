"""What a headless node says when the first one, or a worker of its own, has ended."""

import errno
import multiprocessing
import socket
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from threading import Event, Thread
from typing import Any

import pytest

pytest.importorskip("vllm")

from lvllm.faults import first_node
from lvllm.faults.first_node import wait_for_an_end


@pytest.fixture
def worker() -> Iterator[BaseProcess]:
    process = multiprocessing.get_context("fork").Process(
        target=time.sleep, args=(60,), name="VllmWorker-1"
    )
    process.start()
    yield process
    process.kill()
    process.join()


@pytest.fixture
def store() -> Iterator[socket.socket]:
    """Where the first node's store listens."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


def said(worker: BaseProcess, store: socket.socket) -> str:
    """The line in which the node ends, which leaves no worker."""
    with pytest.raises(SystemExit) as ended:
        wait_for_an_end([worker], *store.getsockname())
    worker.join()
    return str(ended.value.code)


def gone(store: socket.socket, why: str) -> str:
    port = store.getsockname()[1]
    return f"lvllm: the first node (127.0.0.1:{port}) is gone ({why}), so this one ends"


def test_a_first_node_that_ends(worker: BaseProcess, store: socket.socket) -> None:
    def end() -> None:
        connected, _ = store.accept()
        time.sleep(0.2)
        assert worker.is_alive()
        connected.close()

    Thread(target=end).start()
    assert said(worker, store) == gone(store, "Connection closed")


def test_a_first_node_that_ended_before(worker: BaseProcess) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        assert said(worker, nobody) == gone(nobody, "Connection refused")


def test_a_host_that_has_forgotten_the_connection(
    worker: BaseProcess, store: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, connect = Event(), socket.create_connection

    def connecting(*arguments: Any) -> socket.socket:
        connection = connect(*arguments)
        made.set()
        return connection

    def forget() -> None:
        connected, _ = store.accept()
        assert made.wait(60)  # Before, the reset would be an error of a connection in the making.
        at_once = (1).to_bytes(4, "little") + (0).to_bytes(4, "little")
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
        connected.close()  # Instead of the end of the stream, this sends a reset.

    monkeypatch.setattr(socket, "create_connection", connecting)
    Thread(target=forget).start()
    assert said(worker, store) == gone(store, "Connection reset by peer")


def test_a_network_that_pauses_ends_nothing(
    worker: BaseProcess, store: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect, tried, made = socket.create_connection, list[Any](), Event()

    def pausing(*arguments: Any) -> socket.socket:
        tried.append(arguments)
        if len(tried) < 3:
            raise OSError(errno.ENETUNREACH, "Network is unreachable")
        made.set()
        return connect(*arguments)

    def die() -> None:
        assert made.wait(60)
        time.sleep(0.5)
        worker.kill()

    monkeypatch.setattr(first_node, "RETRY_SECONDS", 0.1)
    monkeypatch.setattr(socket, "create_connection", pausing)
    Thread(target=die).start()
    line = "lvllm: the process VllmWorker-1 was ended by SIGKILL, so the server ends"
    assert said(worker, store) == line
    assert len(tried) == 3
