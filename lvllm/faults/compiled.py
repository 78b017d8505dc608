"""Files of PyTorch's compiler that must not be used: those of others, and unfinished ones.

PyTorch runs whatever library lies in its cache folder. By default that folder is in /tmp, under a
name that anybody may take first.

Inductor lets g++ write each library and each precompiled header under its final name, and later
takes whatever has the name for finished. So a server that is killed while it compiles, with its
whole container, say, leaves a file at which every later start fails ("file too short", "cannot
read PCH file"). While it builds a file, Inductor holds the lock KEY.lock in the folder `locks`.
"""

import os
import stat
import struct
from pathlib import Path

from filelock import FileLock, Timeout

from lvllm.errors import LvllmError
from lvllm.log import logger

__all__ = ["check_owner", "prepare", "remove_unfinished"]

SECTION_TABLE = struct.Struct("<40xQ10xHH2x")
"""A 64-bit ELF header, of which we need the section table's offset, entry size and count."""


def prepare() -> None:
    """In the front process, remove what would stop the workers.

    Raises LvllmError if the folder from which they would run code is another user's.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir
    from vllm import envs

    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        check_owner(Path(default_cache_dir()))
    remove_unfinished(Path(envs.VLLM_CACHE_ROOT) / "torch_compile_cache", Path(default_cache_dir()))


def check_owner(folder: Path) -> None:
    """Make the folder, or raise LvllmError if others than this user and root can write to it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    own = stat.S_ISDIR(status.st_mode) and status.st_uid in (0, os.getuid())
    if not own or status.st_mode & stat.S_IWOTH:
        raise LvllmError(
            f"{folder}: PyTorch would run code from this folder, and another user can write to it:"
            " remove it, or let TORCHINDUCTOR_CACHE_DIR name a folder of your own"
        )


def remove_unfinished(of_vllm: Path, of_torch: Path) -> None:
    """Remove the unfinished files that no process is building; PyTorch then builds them again.

    `of_vllm` is vLLM's folder of compiled models, `of_torch` PyTorch's own cache folder, which has
    the precompiled headers. Files of another user, which cannot be read or removed, stay.
    """
    built = [*of_vllm.rglob("inductor_cache/*/*.so"), *of_torch.glob("*/*.so")]
    for library in built:
        if not _is_whole(library):
            _remove(library, library.parent.parent / "locks")
    # A header does not tell its length. The one that a kill cut short is newer than all libraries,
    # since libraries are built with it. Building a whole one again costs seconds.
    newest = max(map(_modified, built), default=0)
    headers = of_torch / "precompiled_headers"
    for header in headers.glob("*.h.gch"):
        if _modified(header) > newest:
            _remove(header, headers / "locks")


def _modified(path: Path) -> int:
    """The time of the last change in nanoseconds; 0: the file is gone."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _is_whole(library: Path) -> bool:
    """Whether a library reaches to the end of its section table, which linkers write last."""
    try:
        with library.open("rb") as file:
            header = file.read(SECTION_TABLE.size)
        size = library.stat().st_size
    except OSError:
        return True
    if len(header) < SECTION_TABLE.size or not header.startswith(b"\x7fELF"):
        return False
    offset, entry, count = SECTION_TABLE.unpack(header)
    return offset > 0 and offset + entry * count <= size


def _remove(path: Path, locks: Path) -> None:
    """Remove a file unless a process holds its lock."""
    key = path.name.partition(".")[0]
    try:
        with FileLock(locks / f"{key}.lock", timeout=0):
            path.unlink(missing_ok=True)
    except (OSError, Timeout):  # A Timeout: a process is building it.
        return
    logger.info("LvLLM: removed %s, which is or may be unfinished; PyTorch builds it again", path)
