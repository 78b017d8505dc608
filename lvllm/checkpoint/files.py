"""Opens and reads the files of a checkpoint."""

import errno
import os
import stat
from pathlib import Path

__all__ = ["OpenFile", "open_regular"]


def open_regular(path: Path) -> int:
    """Open a file for reading, and return its descriptor.

    Raises OSError, also for what is no regular file: to open a FIFO would wait for its writer.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        raise OSError(errno.EINVAL, "is no regular file")
    return descriptor


class OpenFile:
    """An open file. It is closed when nobody holds it any more. Raises OSError."""

    def __init__(self, path: Path) -> None:
        self._descriptor = open_regular(path)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def fill(self, memory: memoryview, start: int) -> None:
        """Fill all of `memory` with the bytes from byte `start` on.

        Raises EOFError if the file ends before, and OSError.
        """
        while memory:
            count = os.preadv(self._descriptor, [memory], start)
            if count == 0:
                raise EOFError
            memory, start = memory[count:], start + count

    def will_need(self, start: int, end: int) -> None:
        """Ask the kernel to have these bytes in the page cache soon."""
        os.posix_fadvise(self._descriptor, start, end - start, os.POSIX_FADV_WILLNEED)
