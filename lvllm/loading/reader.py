"""Tensors that are read when they are copied, into the memory that they are copied to.

`Reader.read` yields a checkpoint's tensors as `FileTensor`s: they have a dtype and a shape, and no
memory. A loader slices and transposes them as it likes; what it copies into a parameter at last
goes from the file into that parameter's memory by pread, in pieces, on several threads. So nothing
is buffered, and what a rank does not take (another rank's rows, what a draft model shares with its
target) is not read. Nothing is mapped either: mapped pages count as resident memory.
"""

import ctypes
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from lvllm.checkpoint.headers import TensorInfo

__all__ = ["FileTensor", "Reader", "in_loading_order"]

PIECE = 512 << 10
"""Bytes that are worth a thread: reading them takes 0.1 ms, handing them over a fifth of it."""
AHEAD = 256 << 20
"""Bytes that the kernel is asked to have in the page cache before they are wanted."""
MOST_THREADS = 8
# Those of inputs come from calibration, which may have left an expert out, and are not used.
SCALE = re.compile(r"scale[^.]*$")
SCALE_OF_INPUTS = re.compile(r"(?:^|[._])(?:in|out)put_[^.]*$")
DIVISOR = re.compile(r"weight_global_scale$")
LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.(\d+)\.")


def in_loading_order(tensors: Iterable[TensorInfo]) -> list[TensorInfo]:
    """Tensors layer by layer over all files, those of a layer by position.

    Names with a common beginning stay together, as in alphabetical order: vLLM's loaders hand each
    run of them to the module of that name.
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
    """Threads that read on `cpus`; by default where the calling thread may run.

    It may be pinned to one CPU, which threads inherit.
    """

    def __init__(self, cpus: Sequence[int] | None = None) -> None:
        where = sorted(cpus or os.sched_getaffinity(0))
        self.threads = min(len(where), MOST_THREADS)
        self.bytes_read = 0
        run_there = (os.sched_setaffinity, (0, where))
        # The calling thread reads too.
        self._pool = ThreadPoolExecutor(max(1, self.threads - 1), "lvllm-read", *run_there)
        self._adviser = ThreadPoolExecutor(1, "lvllm-ahead", *run_there)
        self._files: dict[Path, _File] = {}

    def read(self, tensors: Iterable[TensorInfo]) -> Iterator["FileTensor"]:
        """Yield these tensors, and have what follows read into the page cache meanwhile.

        They remain good after the next one. Reading, whenever it happens, raises CheckpointError.
        """
        order = list(tensors)
        window = _Window(order)
        try:
            for number, info in enumerate(order):
                tensor = FileTensor.of(self, info)
                yield tensor
                # Nothing is asked for ahead of a consumer that passes over what it gets.
                if tensor.source.wanted:
                    for run in window.move(number):
                        self._adviser.submit(self.open(run[0]).will_need, *run[1:])
        finally:
            self._adviser.shutdown(wait=False, cancel_futures=True)
            self._files.clear()

    def open(self, path: Path) -> "_File":
        """The file of that path, from now on opened while the reader reads."""
        if path not in self._files:
            self._files[path] = _File(path)
        return self._files[path]

    def fill(self, memory: memoryview, file: "_File", start: int) -> None:
        """Read into all of `memory` what `file` has from byte `start` on.

        Raises EOFError or OSError.
        """
        size = len(memory)
        parts = max(1, min(self.threads, size // PIECE))
        share = -(-size // parts // 4096) * 4096 if parts > 1 else size
        others = [
            self._pool.submit(file.fill, memory[at : at + share], start + at)
            for at in range(share, size, share)
        ]
        file.fill(memory[:share], start)
        for other in others:
            other.result()
        self.bytes_read += size


class _File:
    """An open file, closed when nobody holds it."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def fill(self, memory: memoryview, start: int) -> None:
        while memory:
            count = os.preadv(self._descriptor, [memory], start)
            if count == 0:
                raise EOFError
            memory, start = memory[count:], start + count

    def will_need(self, start: int, end: int) -> None:
        os.posix_fadvise(self._descriptor, start, end - start, os.POSIX_FADV_WILLNEED)


class _Window:
    """What to ask the kernel for: the AHEAD bytes of an order that follow a tensor of it."""

    def __init__(self, order: list[TensorInfo]) -> None:
        self._order = order
        self._ends = list(accumulate(info.nbytes for info in order))
        self._next = 0

    def move(self, number: int) -> list[tuple[Path, int, int]]:
        """(file, start, end) that were not asked for yet when tensor `number` has been read."""
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


class _Source:
    """A tensor in its file, or in memory once somebody has written to it."""

    def __init__(self, reader: Reader, info: TensorInfo) -> None:
        self.info = info
        self._reader = reader
        self._file = reader.open(info.file)
        self.wanted = False
        self.memory: torch.Tensor | None = None

    def read(self, layout: torch.Tensor) -> torch.Tensor:
        """A copy of what `layout`, a view of the whole, sees of it; of the same strides."""
        size, stride, first = layout.size(), layout.stride(), layout.storage_offset()
        if self.memory is None:
            # The bytes from its first element to its last one.
            extent = sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1
            extent = extent * layout.itemsize if layout.numel() else 0
            memory = torch.empty(extent, dtype=torch.uint8, device="cpu")
            self._fill(memory, int(first) * layout.itemsize)
            first = 0
        else:
            memory = self.memory
        return memory.view(layout.dtype).as_strided(size, stride, first)

    def copy(self, layout: torch.Tensor, to: torch.Tensor) -> bool:
        """Read what `layout` sees into the memory of `to`, if it lies there in one piece too."""
        if (
            self.memory is not None
            or to.device.type != "cpu"
            or to.dtype != layout.dtype
            or to.size() != layout.size()
            or not to.is_contiguous()
            or not layout.is_contiguous()
        ):
            return False
        self._fill(to, int(layout.storage_offset()) * layout.itemsize)
        return True

    def load(self) -> None:
        """Have it in memory from now on."""
        if self.memory is None:
            memory = torch.empty(self.info.nbytes, dtype=torch.uint8, device="cpu")
            self._fill(memory, 0)
            self.memory = memory

    def _fill(self, to: torch.Tensor, offset: int) -> None:
        """Read into all of the contiguous `to` the bytes from `offset` on."""
        self.wanted = True
        if to.numel() == 0:
            return
        size = to.numel() * to.itemsize
        memory = memoryview((ctypes.c_char * size).from_address(to.data_ptr())).cast("B")
        try:
            self._reader.fill(memory, self._file, self.info.start + offset)
        except EOFError:
            raise self.info.refuse("the file was truncated while it was read") from None
        except OSError as error:
            raise self.info.refuse(error.strerror or str(error)) from None
        name, dtype = self.info.name, self.info.dtype
        if SCALE.search(name) and not SCALE_OF_INPUTS.search(name) and size % dtype.itemsize == 0:
            self._check_numbers(torch.frombuffer(memory, dtype=dtype))

    def _check_numbers(self, scales: torch.Tensor) -> None:
        """Scales multiply whole groups of weights: one that is no number spoils every token."""
        for some in scales.split(1 << 20):  # the float32 copy of an 8-bit type takes 4 MiB
            if some.dtype == torch.uint8:  # e8m0, where 255 is NaN
                bad = some == 255
            elif some.is_floating_point():
                bad = ~torch.isfinite(some if some.itemsize > 1 else some.float())
            else:
                return
            if bad.any():
                raise self.info.refuse(f"{int(bad.sum())} of its scales are NaN or infinite")
            if DIVISOR.search(self.info.name) and not some.all():
                raise self.info.refuse("is 0, and weights are divided by it")


class FileTensor(torch.Tensor):
    """A tensor of a checkpoint, or a view of one, that is still in its file.

    A view of it reads nothing; `copy_` from it reads into the other's memory; any other operation
    reads what it sees into memory of its own. One that writes to it keeps it in memory for all its
    views.
    """

    source: _Source
    _view: torch.Tensor  # on the meta device: its shape, strides and place in the whole

    @classmethod
    def of(cls, reader: Reader, info: TensorInfo) -> "FileTensor":
        """The whole tensor."""
        whole = torch.empty(info.shape, dtype=info.dtype, device="meta")
        return cls(_Source(reader, info), whole)

    @staticmethod
    def __new__(cls, source: _Source, view: torch.Tensor) -> "FileTensor":
        made: FileTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            view.size(),
            strides=view.stride(),
            storage_offset=view.storage_offset(),
            dtype=view.dtype,
            device=torch.device("cpu"),
        )
        return made

    def __init__(self, source: _Source, view: torch.Tensor) -> None:
        self.source = source
        self._view = view

    def in_memory(self) -> torch.Tensor:
        """A plain tensor of the same values and strides."""
        return self.source.read(self._view)

    def _filling(self, dtype: torch.dtype) -> "FileTensor":
        """What is copied into memory of `dtype`. CheckpointError for another kind of numbers:
        PyTorch would make an integer 0 of 0.3 without a word.
        """
        if dtype == torch.uint8 and self.dtype == torch.float8_e8m0fnu:
            # Exponents are kept as bytes; as a number, 2**-7 would become 0.
            return FileTensor(self.source, self._view.view(torch.uint8))
        if dtype.is_floating_point != self.dtype.is_floating_point:
            stored, wanted = (str(of).removeprefix("torch.") for of in (self.dtype, dtype))
            raise self.source.info.refuse(f"is {stored}, the model takes {wanted}")
        return self

    # What does not pass __torch_dispatch__.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        info = self.source.info
        return f"FileTensor({info.name!r}, {list(self.shape)}, {self.dtype}, file={info.file})"

    def numpy(self, **options: Any) -> Any:
        return self.in_memory().numpy(**options)

    def tolist(self) -> Any:
        return self.in_memory().tolist()

    def data_ptr(self) -> int:
        self.source.load()
        return self.in_memory().data_ptr()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.copy_.default:
            to, source = args[:2]
            if not isinstance(to, cls):
                source = source._filling(to.dtype)
                if source.source.copy(source._view, to):
                    return to
                args = (to, source, *args[2:])
        if func.is_view and isinstance(args[0], cls):
            viewed = args[0]
            storage = viewed._view.untyped_storage()._cdata
            seen = func(viewed._view, *args[1:], **kwargs)
            views = [seen] if isinstance(seen, torch.Tensor) else seen
            # Some of these copy where no view will do.
            if all(view.untyped_storage()._cdata == storage for view in views):
                made = [cls(viewed.source, view) for view in views]
                return made[0] if isinstance(seen, torch.Tensor) else made
        if func._schema.is_mutable:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                written = argument.alias_info is not None and argument.alias_info.is_write
                if written and isinstance(value, cls):
                    value.source.load()
        args, kwargs = tree_map_only(cls, cls.in_memory, (args, kwargs))
        return func(*args, **kwargs)
