"""Threads that read the tensors of a checkpoint, and the order in which tensors are read.

`Reader.read` yields a checkpoint's tensors as `FileTensor`s, which have a dtype and a shape but no
memory. A loader slices and transposes them as it likes. When it copies one into a parameter, pread
puts the bytes from the file straight into the parameter's memory, in pieces, on several threads. So
nothing is buffered. A tensor that a process does not copy is not read: another rank's rows, or the
weights that a draft model shares with its target. Nothing is mapped either, because mapped pages
count as resident memory.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import accumulate
from pathlib import Path

from lvllm.checkpoint.files import OpenFile
from lvllm.checkpoint.headers import TensorInfo
from lvllm.loading import in_hand
from lvllm.loading.file_tensor import FileTensor
from lvllm.units import ceil_div

__all__ = ["Reader", "in_loading_order"]

PIECE = 512 << 10
"""The smallest number of bytes that is worth another thread: reading 512 KiB takes 0.1 ms, and
handing the work to a thread takes a fifth of that.
"""
AHEAD = 256 << 20
"""The kernel is asked to have this many bytes in the page cache before they are wanted."""
MOST_THREADS = 8
LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.(\d+)\.")


def in_loading_order(tensors: Iterable[TensorInfo]) -> list[TensorInfo]:
    """Sort tensors layer by layer over all files, and within a layer by their place in the file.

    Names with a common beginning stay together, as in alphabetical order: vLLM's loaders hand each
    run of such names to the module of that name.
    """

    def key(tensor: TensorInfo) -> tuple[list[str], int, Path, int, int]:
        found = LAYER.search(tensor.name)
        if found is None:
            head, layer = tensor.name.split(".")[:2], 0
        else:
            head, layer = tensor.name[: found.start()].split("."), int(found[1])
        return head, layer, tensor.file, tensor.start, tensor.end

    return sorted(tensors, key=key)


class Reader:
    """Threads that read on `cpus`, or by default on all CPUs that the calling thread may use.

    The threads set their own CPUs, because OpenMP may have pinned the calling thread to one CPU and
    threads inherit that.
    """

    def __init__(self, cpus: Sequence[int] | None = None) -> None:
        where = sorted(cpus or os.sched_getaffinity(0))
        self.threads = min(len(where), MOST_THREADS)
        self.bytes_read = 0
        run_there = (os.sched_setaffinity, (0, where))
        # The calling thread reads too.
        self._pool = ThreadPoolExecutor(max(1, self.threads - 1), "lvllm-read", *run_there)
        self._adviser = ThreadPoolExecutor(1, "lvllm-ahead", *run_there)
        self._files: dict[Path, OpenFile] = {}

    def read(self, tensors: Iterable[TensorInfo]) -> Iterator[FileTensor]:
        """Yield these tensors, and meanwhile ask for the bytes that follow in the page cache.

        A tensor remains usable after the next one is yielded. Its bytes are read when it is used.
        Opening a file and reading from it raise CheckpointError.
        """
        order = list(tensors)
        window = _Window(order)
        try:
            for number, info in enumerate(order):
                try:
                    file = self.open(info.file)
                except OSError as error:
                    raise info.refuse(error.strerror or str(error)) from None
                tensor = FileTensor.of(info, partial(self._fill, file))
                in_hand.note(info)
                yield tensor
                # A consumer that passes over its tensors needs no bytes in the page cache.
                if tensor.source.wanted:
                    for run in window.move(number):
                        self._adviser.submit(self.open(run[0]).will_need, *run[1:])
            in_hand.clear()
        finally:
            self._adviser.shutdown(wait=False, cancel_futures=True)
            self._files.clear()

    def open(self, path: Path) -> OpenFile:
        """The file at `path`, which stays open while the reader reads. Raises OSError."""
        if path not in self._files:
            self._files[path] = OpenFile(path)
        return self._files[path]

    def _fill(self, file: OpenFile, memory: memoryview, start: int) -> None:
        """Fill all of `memory` with the bytes of `file` from byte `start` on.

        Raises:
            EOFError: if the file ends before.
            OSError: if the system cannot read it.
        """
        size = len(memory)
        parts = max(1, min(self.threads, size // PIECE))
        share = ceil_div(ceil_div(size, parts), 4096) * 4096 if parts > 1 else size
        others = [
            self._pool.submit(file.fill, memory[at : at + share], start + at)
            for at in range(share, size, share)
        ]
        file.fill(memory[:share], start)
        for other in others:
            other.result()
        self.bytes_read += size


class _Window:
    """The AHEAD bytes of an order of tensors that follow the tensor which was read last."""

    def __init__(self, order: list[TensorInfo]) -> None:
        self._order = order
        self._ends = list(accumulate(info.nbytes for info in order))
        self._next = 0

    def move(self, number: int) -> list[tuple[Path, int, int]]:
        """Move the window behind tensor `number`.

        Returns (file, start, end) of each run of bytes that the window has now and that was not
        asked for before.
        """
        limit = self._ends[number] + AHEAD
        self._next = max(self._next, number + 1)
        asked = self._ends[self._next - 1]
        if limit - asked < AHEAD // 8:  # a call for every small tensor would cost more than it buys
            return []
        runs: list[tuple[Path, int, int]] = []
        while self._next < len(self._order) and self._ends[self._next - 1] < limit:
            info = self._order[self._next]
            if runs and runs[-1][0] == info.file and runs[-1][2] == info.start:
                runs[-1] = (info.file, runs[-1][1], info.end)
            else:
                runs.append((info.file, info.start, info.end))
            self._next += 1
        return runs
