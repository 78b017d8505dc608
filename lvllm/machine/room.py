"""What a start needs of the machine beside memory: open files, and room in /dev/shm."""

import resource
import shutil

from lvllm.errors import LvllmError
from lvllm.units import MIB

__all__ = ["allow_many_files", "check_open_files", "check_shared_memory", "queue_bytes"]

OPEN_FILES = 256
"""The most files of one process that a server of a small model has open. A worker has 100, 120 with
shared experts, and an API server 35 and one for each client."""


def queue_bytes(chunk_mib: int = 16) -> int:
    """What vLLM's queue to its workers takes of /dev/shm: 10 chunks, of 16 MiB by default."""
    return 10 * chunk_mib * MIB


def allow_many_files() -> int:
    """Raise this process's limit of open files as far as it may. Returns the limit.

    The usual limit is 1024. vLLM asks for 65535, and leaves the limit as it is where it may not
    have so many. A server needs one for each client, and a bank of experts 2 or 3 for each layer
    and rank.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return most


def check_open_files() -> None:
    """Allow many open files. Raises LvllmError where that are too few for a server."""
    most = allow_many_files()
    if 0 <= most < OPEN_FILES:
        raise LvllmError(
            f"a process may have {most} open files (`ulimit -Hn`), and a server needs {OPEN_FILES};"
            " raise the limit (in Docker: --ulimit nofile=65535; systemd: LimitNOFILE=65535)"
        )


def check_shared_memory(needed: int, folder: str = "/dev/shm") -> None:
    """Raise LvllmError if the folder has no room for `needed` bytes."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError:  # vLLM runs without the folder.
        return
    if free < needed:
        raise LvllmError(
            f"{folder} has {free >> 20} MiB free, and vLLM's processes need {needed >> 20} MiB to"
            f" talk to each other; delete files there, or make it larger (in Docker: --shm-size=1g"
            f" or --ipc=host; otherwise: mount -o remount,size=1g {folder})"
        )
