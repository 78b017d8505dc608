"""Layers in shared memory that a process offers to others of its user."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from lvllm.handover import sockets

__all__ = ["Offers", "serve"]

TOLD_SECONDS = 5
"""How long `Offers.end` waits at most for processes that do not read what they are told."""


class Offers:
    """Hands out the file descriptors of layers under the name of a listening socket.

    A process that connects asks for one layer after the other, by its name, and gets a message with
    the descriptors of its memory as soon as the layer is there. The message of a layer that will
    never come has the key "error". Threads answer, until this is closed.
    """

    def __init__(self, listening: socket.socket) -> None:
        self.open = True
        self._listening = listening
        self._layers: dict[str, tuple[Any, list[int]]] = {}
        self._missing: str | None = None
        self._changed = threading.Condition()
        self._waiting = 0
        self._attached: dict[socket.socket, int] = {}
        serve(listening, self._answer)

    @property
    def attached(self) -> list[int]:
        """The processes that have asked for layers and are still connected."""
        return sorted(set(self._attached.copy().values()))

    def add(self, layer: str, message: Any, descriptors: list[int]) -> None:
        """Offer a layer. The descriptors must stay open until `close`."""
        with self._changed:
            self._layers[layer] = message, descriptors
            self._changed.notify_all()

    def end(self, reason: str) -> None:
        """From now on no layer is added. Who wants another one is told the `reason`.

        Who waits for one has been told when this returns.
        """
        with self._changed:
            self._missing = reason
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._waiting == 0, TOLD_SECONDS)

    def close(self) -> None:
        """Give the name up. Processes that have mapped layers keep them."""
        with self._changed:
            self.open = False
            self._layers = {}
            self._changed.notify_all()
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)  # This ends accept().
        self._listening.close()

    def _answer(self, connection: socket.socket) -> None:
        try:
            while True:
                wanted, _ = sockets.receive(connection)
                self._attached[connection] = sockets.peer(connection)[0]
                with self._waits_for(wanted):
                    if wanted in self._layers:
                        sockets.send(connection, *self._layers[wanted])
                    elif self._missing is not None:
                        sockets.send(connection, {"error": self._missing})
                    else:
                        return
        finally:
            self._attached.pop(connection, None)

    @contextmanager
    def _waits_for(self, layer: str) -> Iterator[None]:
        """The block runs, locked, once the layer is there, or it is known that it never will be."""
        with self._changed:
            self._waiting += 1
            try:
                self._changed.wait_for(
                    lambda: layer in self._layers or self._missing is not None or not self.open
                )
                yield
            finally:
                self._waiting -= 1
                self._changed.notify_all()


def serve(listening: socket.socket, answer: Callable[[socket.socket], None]) -> None:
    """Call `answer` with each connection of this user or root, in threads of their own.

    A connection is closed when `answer` returns, or raises OSError or EOFError, as it does when the
    other process ends.
    """

    def one(connection: socket.socket) -> None:
        with connection, suppress(OSError, EOFError):
            if sockets.is_trusted(connection):
                answer(connection)

    def accept() -> None:
        while True:
            try:
                connection = listening.accept()[0]
            except OSError:
                return
            threading.Thread(
                target=one, args=(connection,), name="lvllm-share", daemon=True
            ).start()

    threading.Thread(target=accept, name="lvllm-share", daemon=True).start()
