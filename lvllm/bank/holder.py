"""The process that holds experts: it names them, takes them from the loader and hands them out."""

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any

from lvllm.errors import LvllmError
from lvllm.handover import sockets
from lvllm.handover.banks import PREFIX, Bank
from lvllm.handover.offers import Offers, serve
from lvllm.machine import room

__all__ = ["Holder"]


class Holder:
    """What a bank knows and has.

    It listens under `name`, and answers with its status, or takes what the loader sends. From the
    moment the loader has said what it will load, servers can attach; each of their ranks waits for
    a layer until that is there.

    Args:
        model: the model, as the user named it.
        changed: is called with the status after each change, in any thread.
        inherited: sockets at which this bank answers, too. They are systemd's and outlive it.
    """

    def __init__(
        self,
        model: str,
        changed: Callable[[Bank], None],
        inherited: Sequence[socket.socket] = (),
    ) -> None:
        room.allow_many_files()
        self.name = f"{PREFIX}{secrets.token_hex(8)}"
        self._status = Bank(model=model, state="starting", pid=os.getpid(), started=time.time())
        self._report = changed
        self._offers: dict[str, Offers] = {}
        self._descriptors: list[int] = []
        self._changed = threading.Condition()
        self._why: str | None = None
        self._resources = ExitStack()
        listening = sockets.bind(self.name)
        assert listening is not None  # Nobody else has a name with 64 random bits.
        self._resources.callback(listening.close)
        self._resources.callback(_shut_down, listening)
        for one in (listening, *inherited):
            serve(one, self._answer)

    @property
    def status(self) -> Bank:
        attached = sorted({pid for offers in self._offers.values() for pid in offers.attached})
        return self._status.model_copy(update={"attached": tuple(attached)})

    @property
    def failure(self) -> str | None:
        """What the loader said of its failure."""
        return self._why

    def fail(self, why: str) -> None:
        """Nothing more will be loaded. Servers that wait are told why."""
        with self._changed:
            self._why = self._why or why
            self._changed.notify_all()
        for offers in self._offers.values():
            offers.end(self._why)

    def close(self) -> None:
        """Give the names and the memory up. Servers keep what they have mapped."""
        for offers in self._offers.values():
            offers.close()
        self._resources.close()
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []

    def _answer(self, connection: socket.socket) -> None:
        while True:
            message, descriptors = sockets.receive(connection)
            try:
                sockets.send(connection, self._do(message, descriptors))
            except LvllmError as error:
                sockets.send(connection, {"error": str(error)})

    def _do(self, message: dict[str, Any], descriptors: list[int]) -> dict[str, Any]:
        if "ask" in message:
            if message["ask"] == "identity":
                with self._changed:
                    self._changed.wait_for(lambda: self._status.name or self._why)
            return self.status.model_dump()
        if "deposit" in message:
            self._deposit(message, descriptors)
        elif "loads" in message:
            self._identify(message["loads"], message["ranks"], message["identity"])
        elif "loaded" in message:
            for offers in self._offers.values():
                offers.end("the server's model has a layer that the bank's has not")
            self._set(state="ready")
        else:
            self.fail(message["failed"])
        return {}

    def _identify(self, name: str, ranks: int, identity: dict[str, str]) -> None:
        """Take the name of these experts for all ranks. Raises LvllmError if a server has it."""
        for rank in range(ranks):
            listening = sockets.bind(f"{name}/{rank}")
            if listening is None:
                holder = sockets.holder_of(f"{name}/{rank}")
                raise LvllmError(
                    f"process {holder} holds these experts already: it is a bank or a server with"
                    " LVLLM_SHARE_EXPERTS=1, which must end first"
                )
            self._offers[f"{name}/{rank}"] = Offers(listening)
        self._set(state="loading", name=name, ranks=ranks, identity=identity)

    def _deposit(self, message: dict[str, Any], descriptors: list[int]) -> None:
        self._descriptors += descriptors
        layer = message["message"]
        self._offers[message["name"]].add(message["deposit"], layer, descriptors)
        self._set(
            layers=self._status.layers + 1,
            bytes=self._status.bytes + sum(layer["areas"]),
            formats=tuple(sorted({*self._status.formats, layer["stored"]["format"]})),
        )

    def _set(self, **values: Any) -> None:
        with self._changed:
            self._status = self._status.model_copy(update=values)
            self._changed.notify_all()
        self._report(self.status)


def _shut_down(listening: socket.socket) -> None:
    with suppress(OSError):
        listening.shutdown(socket.SHUT_RDWR)  # This ends accept().
