"""The memory in which all processes of a server count, and which its API servers read.

The front process makes a file without a name, which the others open through /proc. It is gone with
the last process that uses it, however they end, so a later server cannot read an old count, and
other users cannot open it. Each process adds blocks: numbers that it alone writes, without a lock,
and a description of what each number means. A block never moves and never changes its size.
"""

import fcntl
import json
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lvllm.log import logger
from lvllm.units import ceil_div

__all__ = ["Block", "Numbers", "Reader", "Series", "close", "engine_name", "open_block", "prepare"]

Numbers = NDArray[np.int64]

_VARIABLE = "_LVLLM_METRICS"
"""The environment variable with PROCESS:FILE DESCRIPTOR of the front process."""

_HEADER = np.dtype([("bytes", np.int64), ("description", np.int64)])
"""How a block begins: its size, and that of its description, which follows. The numbers come next,
at a multiple of 8 bytes. The size is written last, and is 0 until then."""

_made: int | None = None
"""The file descriptor of the file that this process made."""


@dataclass(frozen=True)
class Series:
    """A metric's value under one set of labels: the sum of some numbers of a block.

    Attributes:
        sample: the name in `/metrics`.
        labels: those beside the labels of the block.
        slots: the places of the numbers.
        scale: what the numbers are multiplied with, one factor for all or one for each.
        each: a label and its values, one for each number. The numbers are not added up then; each
            is a value of its own.
    """

    sample: str
    labels: Mapping[str, str]
    slots: Sequence[int]
    scale: float | Sequence[float] = 1.0
    each: tuple[str, Sequence[str]] | None = None


@dataclass(frozen=True)
class Block:
    """A block as another process reads it."""

    labels: Mapping[str, str]
    series: Sequence[Series]
    begin: int
    """Where its numbers begin in the file, in bytes."""
    size: int
    """How many numbers it has."""


def prepare() -> None:
    """In the front process, make the file before the others start. Without it nothing is counted.

    Only the newest file of a process is read: an earlier one belongs to a model of `LLM(...)` that
    was there before.
    """
    global _made
    close()
    try:
        _made = os.memfd_create("lvllm-metrics")
        os.fchmod(_made, 0o600)
    except OSError as error:
        logger.warning("LvLLM: there will be no metrics: %s", error)
        return
    os.environ[_VARIABLE] = f"{os.getpid()}:{_made}"


def close() -> None:
    """Give the file back: from now on this process reads and adds nothing."""
    global _made
    os.environ.pop(_VARIABLE, None)
    if _made is not None:
        os.close(_made)
        _made = None


def engine_name(vllm_config: Any) -> str:
    """The label `engine`: the number of a replica as in vLLM's metrics, or "prefill"."""
    transfer = vllm_config.kv_transfer_config
    if transfer is not None and transfer.is_kv_producer:
        return "prefill"
    return str(vllm_config.parallel_config.data_parallel_index)


def open_block(labels: Mapping[str, str], series: Sequence[Series], size: int) -> Numbers | None:
    """Add a block of `size` numbers, all zero, which this process alone writes.

    Returns None where nothing is counted.
    """
    if _VARIABLE not in os.environ:
        return None
    described: dict[str, Any] = {"labels": labels, "size": size, "series": list(map(vars, series))}
    text = json.dumps(described).encode()
    begin = ceil_div(_HEADER.itemsize + len(text), 8) * 8
    length = ceil_div(begin + 8 * size, mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
    try:
        with _opened(os.O_RDWR) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            at = os.fstat(file).st_size
            os.ftruncate(file, at + length)
            os.pwrite(file, text, at + _HEADER.itemsize)
            os.pwrite(file, np.array((length, len(text)), _HEADER).tobytes(), at)
            memory = mmap.mmap(file, length, offset=at)
            # Closing the file is not enough, since Python's mmap keeps a copy of the descriptor.
            fcntl.flock(file, fcntl.LOCK_UN)
    except OSError as error:
        logger.warning("LvLLM: this process has no metrics: %s", error)
        return None
    return np.frombuffer(memory, np.int64, size, begin)


@contextmanager
def _opened(flags: int) -> Iterator[int]:
    process, _, descriptor = os.environ[_VARIABLE].partition(":")
    file = os.open(f"/proc/{process}/fd/{descriptor}", flags)
    try:
        yield file
    finally:
        os.close(file)


@dataclass
class Reader:
    """Reads the blocks. It keeps the descriptions, which do not change."""

    _file: str = ""
    _end: int = 0
    _blocks: list[Block] = field(default_factory=list)

    def read(self) -> list[tuple[Block, Numbers]]:
        """All blocks with their numbers of now. Raises OSError if the front process has ended."""
        file_name = os.environ.get(_VARIABLE, "")
        if file_name != self._file:
            self._file, self._end, self._blocks = file_name, 0, []
        if not file_name:
            return []
        with _opened(os.O_RDONLY) as file:
            size = os.fstat(file).st_size
            if size == 0:
                return []
            with mmap.mmap(file, size, prot=mmap.PROT_READ) as memory:
                self._describe(memory)
                return [(block, _numbers(memory, block)) for block in self._blocks]

    def _describe(self, memory: mmap.mmap) -> None:
        """Read the descriptions of blocks that have been added since the last time."""
        while self._end + _HEADER.itemsize <= len(memory):
            header = memory[self._end : self._end + _HEADER.itemsize]
            length, described = np.frombuffer(header, _HEADER)[0].tolist()
            if length == 0:
                return  # its process is still writing
            first = self._end + _HEADER.itemsize
            data = json.loads(memory[first : first + described])
            begin = ceil_div(first + described, 8) * 8
            series = [Series(**one) for one in data["series"]]
            self._blocks.append(Block(data["labels"], series, begin, data["size"]))
            self._end += length


def _numbers(memory: mmap.mmap, block: Block) -> Numbers:
    view = np.frombuffer(memory, np.int64, block.size, block.begin)
    copied = view.copy()
    del view  # or the file could not be closed
    return copied
