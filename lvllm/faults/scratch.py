"""A folder for the sockets and files by which the processes of one server find each other.

vLLM puts them into the folder for temporary files, and a process that is killed leaves them there.
Here each server has a folder of its own, which only its user can enter. The front process removes
it at its end. If that is killed, the next start of the same user removes the folder: a lock, which
the kernel takes back from a process that ends, says whether its server still runs.
"""

import fcntl
import os
import shutil
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from lvllm.errors import LvllmError

__all__ = ["file_store", "prepare", "remove"]

PREFIX = "lvllm-server-"
SOCKETS = "VLLM_RPC_BASE_PATH"
"""vLLM's variable for the folder of its sockets."""
LONGEST = 107 - len("/") - 36
"""The longest path of such a folder: Linux allows 107 bytes for a socket, and vLLM adds a UUID."""

ROOM = 64 << 10
"""Bytes that the folder must have room for; the ranks of a model write a few KiB."""

_VARIABLE = "_LVLLM_SCRATCH"
"""The environment variable with PROCESS:FOLDER of the front process."""


def prepare() -> None:
    """In the front process, make the folder before vLLM makes sockets.

    A folder that the user has chosen for sockets (VLLM_RPC_BASE_PATH) stays in use, and so does the
    folder for temporary files if the path of one inside it would be too long.

    Raises LvllmError if the folder for temporary files has no room.
    """
    process, _, _ = os.environ.get(_VARIABLE, "").partition(":")
    if process == str(os.getpid()):
        return
    try:
        parent = Path(tempfile.gettempdir())
    except FileNotFoundError as error:  # Its text names the folders that were tried.
        raise LvllmError(f"{error.strerror}; TMPDIR names another one") from None
    _remove_abandoned(parent)
    chosen = os.environ.get(SOCKETS)
    if chosen is not None and Path(chosen).name[: len(PREFIX)] != PREFIX:
        return
    try:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        _check_room(folder)
    except OSError as error:
        raise LvllmError(
            f"the folder for temporary files, {parent}, has no room for {ROOM >> 10} KiB:"
            f" {error.strerror}; make room there, or let TMPDIR name another folder"
        ) from None
    if len(os.fsencode(folder)) > LONGEST:
        folder.rmdir()
        return
    # The descriptor stays open until this process ends. The file gets its name once it is locked:
    # another server that starts now would take the folder for an abandoned one.
    lock = os.open(folder / "new", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.rename(folder / "new", folder / "lock")
    os.environ[_VARIABLE] = f"{os.getpid()}:{folder}"
    os.environ[SOCKETS] = str(folder)
    # At the end of the process, newer finalisers run before it, such as those by which vLLM ends
    # its engines. Until then, NCCL's threads there read the ranks' file once a second, and wait for
    # it if it is gone.
    weakref.finalize(remove, remove)


def file_store() -> str | None:
    """A URL for torch.distributed's FileStore in this server's folder; None: it has no folder."""
    _, _, folder = os.environ.get(_VARIABLE, "").partition(":")
    if not folder or not os.path.isdir(folder):
        return None
    return f"file://{folder}/ranks-{uuid4().hex}"


def remove() -> None:
    """Remove the folder, if this is the front process."""
    process, _, folder = os.environ.get(_VARIABLE, "").partition(":")
    if process == str(os.getpid()):  # Forked processes inherit what is to be done at the end.
        with suppress(OSError):  # It has gone already.
            # Under this name, no other process of the server makes a socket there meanwhile.
            os.rename(folder, f"{folder}-removed")
        shutil.rmtree(f"{folder}-removed", ignore_errors=True)


def _check_room(folder: Path) -> None:
    """Write what the processes need to find each other; without room, remove the folder.

    Raises OSError.
    """
    file = folder / "room"
    try:
        file.write_bytes(bytes(ROOM))
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    file.unlink()


def _remove_abandoned(parent: Path) -> None:
    """Remove the folders of this user's servers that were killed."""
    for folder in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):  # Others' folders, and those that somebody else removes just now.
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            lock = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
