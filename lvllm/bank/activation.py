"""Sockets that systemd hands to a process which it starts at their first connection.

The protocol is that of sd_listen_fds(3): LISTEN_FDS is the number of descriptors, which begin at 3,
and LISTEN_PID the process that they are for.
"""

import os
import socket
from collections.abc import MutableMapping

from lvllm.errors import LvllmError
from lvllm.handover.banks import SOCKET

__all__ = ["inherited"]

FIRST = 3


def inherited(environ: MutableMapping[str, str]) -> list[socket.socket]:
    """The sockets that this process has got. Their variables are removed from `environ`.

    Raises LvllmError for a socket on which servers do not look for banks.
    """
    process = environ.pop("LISTEN_PID", "")
    count = environ.pop("LISTEN_FDS", "0")
    environ.pop("LISTEN_FDNAMES", None)
    if process != str(os.getpid()):
        return []
    return [_checked(FIRST + i) for i in range(int(count))]


def _checked(descriptor: int) -> socket.socket:
    try:
        os.set_inheritable(descriptor, False)
        found = socket.socket(fileno=descriptor)
        listens = found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise LvllmError(f"LISTEN_FDS: descriptor {descriptor}: {error.strerror}") from None
    name = found.getsockname()
    if isinstance(name, bytes):  # An abstract name begins with a zero byte.
        name = "@" + name[1:].decode(errors="replace")
    kind = (found.family, found.type) == (socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if not (kind and listens and str(name).startswith(f"@{SOCKET}")):
        raise LvllmError(
            f"LISTEN_FDS: descriptor {descriptor} has the name {name!r}: servers of this user look"
            f" for ListenSequentialPacket=@{SOCKET}"
        )
    return found
