"""Unix sockets with abstract names, on which messages travel with file descriptors.

Such a name is no file, and it is free again when the process that holds it ends. It has no
permissions either: any user of the host can bind it or connect to it. So both sides ask who is at
the other end (`is_trusted`) before they believe a message.
"""

import json
import os
import socket
import struct
from typing import Any

__all__ = ["bind", "connect", "holder_of", "is_trusted", "peer", "receive", "send"]

MESSAGE_BYTES = 1 << 16
"""The largest message that is read. The message about a layer takes about 1000 bytes."""
MOST_DESCRIPTORS = 16


def bind(name: str) -> socket.socket | None:
    """A socket that listens under `name`; None if another one does."""
    listening = _socket()
    try:
        listening.bind(_address(name))
    except OSError:
        listening.close()
        return None
    listening.listen()
    return listening


def connect(name: str) -> socket.socket:
    """A connection to the process that listens under `name`. Raises OSError if none does."""
    connection = _socket()
    try:
        connection.connect(_address(name))
    except OSError:
        connection.close()
        raise
    return connection


def holder_of(name: str) -> int | None:
    """The process that listens under `name`; None if none does."""
    try:
        with connect(name) as connection:
            return peer(connection)[0]
    except OSError:
        return None


def peer(connection: socket.socket) -> tuple[int, int]:
    """The numbers of the process and of the user at the other end."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    process, user, _ = struct.unpack("3i", credentials)
    return process, user


def is_trusted(connection: socket.socket) -> bool:
    """Whether the process at the other end is this user's or root's.

    Root is systemd, which listens for a bank that it has not started yet.
    """
    return peer(connection)[1] in (0, os.getuid())


def send(connection: socket.socket, message: Any, descriptors: list[int] | None = None) -> None:
    """Send a message, which is anything that JSON has, with file descriptors. Raises OSError."""
    socket.send_fds(connection, [json.dumps(message).encode()], descriptors or [])


def receive(connection: socket.socket) -> tuple[Any, list[int]]:
    """The next message, with its file descriptors. Raises OSError; EOFError at the end."""
    text, descriptors, _, _ = socket.recv_fds(connection, MESSAGE_BYTES, MOST_DESCRIPTORS)
    if not text:
        raise EOFError
    return json.loads(text), descriptors


def _socket() -> socket.socket:
    """A Unix socket that keeps messages apart, as a stream would not."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def _address(name: str) -> bytes:
    return b"\0" + name.encode()
