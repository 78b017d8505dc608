"""How a headless node of several (`--nnodes`) ends with the first one.

Its workers wait for messages of the first node through ZeroMQ, which connects again for ever to a
process that has ended. Its front process waits for nothing but the end of its workers. So it keeps
a connection to the store of the first node's rank 0, in which all ranks have met: the kernel closes
it when that rank ends, however it ends. A node that waits for the first one to start has no such
connection yet: its workers meet the first node's while they start.
"""

import socket
from collections.abc import Sequence
from multiprocessing import connection
from typing import Any, NoReturn

from lvllm.faults.leaving import end_in_a_line
from lvllm.faults.shutdown import wait_for_a_death

__all__ = ["wait_for_an_end"]

RETRY_SECONDS = 5
PROBE_SECONDS = 60
PROBES = 120
"""A connection that says nothing is probed by the kernel, and given up after so many probes. This
is two hours, so that a pause of the network ends nothing. A host that has lost its power answers
the first probe after its restart that it knows no such connection."""


def wait_for_an_end(workers: Sequence[Any], host: str, port: int) -> NoReturn:
    """Wait until a worker has ended or the first node is gone, and end with a line about it.

    All workers are ready, and so have met at the first node's store.

    Args:
        workers: the processes of this node's workers.
        host: the first node's name or address.
        port: of its store.
    """
    gone = _end_of_the_first(workers, host, port)
    if gone is None:
        wait_for_a_death(workers)
    for worker in workers:
        worker.kill()  # It may wait in C++ for ranks that are gone.
    end_in_a_line(f"lvllm: the first node ({host}:{port}) is gone ({gone}), so this one ends")


def _end_of_the_first(workers: Sequence[Any], host: str, port: int) -> str | None:
    """How the connection to the first node's store has ended; None: a worker has ended before."""
    sentinels = [worker.sentinel for worker in workers]
    while True:
        try:
            store = socket.create_connection((host, port), RETRY_SECONDS)
            break
        except ConnectionRefusedError as error:
            return error.strerror
        except OSError:  # The network pauses.
            if connection.wait(sentinels, RETRY_SECONDS):
                return None
    with store:
        store.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        store.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, PROBE_SECONDS)
        store.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, PROBE_SECONDS)
        store.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, PROBES)
        if store not in connection.wait([*sentinels, store]):
            return None
        try:
            store.recv(1)  # The store says nothing that it was not asked.
        except OSError as error:
            return error.strerror
        return "Connection closed"
