"""Registers pages of host memory with a GPU: each page once, as long as a tensor lies in it.

CUDA registers ranges of whole pages, and refuses a range that shares a page with another. Large
tensors have pages of their own, but biases and scales may share a page, also those of different
layers; and a tensor that is copied has to lie in one range. So tensors that share pages are
registered as one range. The range has no other pages: memory that was freed may be replaced by
other pages at the same addresses, and a device that kept the old pages would not see these.
"""

import mmap
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from threading import Lock

import torch

from lvllm.units import ceil_div

__all__ = ["PageRanges", "PinnedTensors"]

Pages = tuple[int, int]
"""The addresses of the first byte and of the byte behind the last, both multiples of a page."""


@dataclass(frozen=True)
class _Range:
    """Pages that are registered together, and the pages of each tensor in them."""

    pages: Pages
    tenants: Counter[Pages]


class PageRanges:
    """Keeps the pages registered that tensors lie in.

    Args:
        register: registers a range, by address and size. If it raises, nothing has changed.
        unregister: unregisters a range, by address.
        settle: waits for all copies. It is called before a range is unregistered.
        page: the size of a page in bytes.
    """

    def __init__(
        self,
        register: Callable[[int, int], object],
        unregister: Callable[[int], object],
        settle: Callable[[], object],
        page: int = mmap.PAGESIZE,
    ) -> None:
        self._register, self._unregister, self._settle = register, unregister, settle
        self._page = page
        self._ranges: list[_Range] = []  # These are in the order of their addresses.

    def add(self, address: int, size: int) -> None:
        """Register the pages of a tensor. Tensors may overlap."""
        pages = self._pages(address, size)
        old = [one for one in self._ranges if one.pages[0] < pages[1] and pages[0] < one.pages[1]]
        tenants = sum((one.tenants for one in old), Counter([pages]))
        self._replace(old, [_Range(_hull(tenants), tenants)])

    def remove(self, address: int, size: int) -> None:
        """Unregister the pages of a tensor that was added, and whose memory still exists."""
        pages = self._pages(address, size)
        place = bisect_right(self._ranges, pages[0], key=lambda one: one.pages[0]) - 1
        old = self._ranges[place]
        self._replace([old], _ranges(old.tenants - Counter([pages])))

    def _pages(self, address: int, size: int) -> Pages:
        return address // self._page * self._page, ceil_div(address + size, self._page) * self._page

    def _replace(self, old: list[_Range], new: list[_Range]) -> None:
        """Register `new` ranges in place of `old` ones. On an error, the old ones are restored."""
        kept = {one.pages for one in old} & {one.pages for one in new}
        gone = [one.pages for one in old if one.pages not in kept]
        come = [one.pages for one in new if one.pages not in kept]
        if gone:
            self._settle()
        for begin, _ in gone:
            self._unregister(begin)
        for place, (begin, end) in enumerate(come):
            try:
                self._register(begin, end - begin)
            except BaseException:
                for registered, _ in come[:place]:
                    self._unregister(registered)
                for first, last in gone:
                    self._register(first, last - first)
                raise
        rest = [one for one in self._ranges if one not in old]
        self._ranges = sorted(rest + new, key=lambda one: one.pages)


def _hull(tenants: Iterable[Pages]) -> Pages:
    """Return the smallest range that contains all of these."""
    return min(begin for begin, _ in tenants), max(end for _, end in tenants)


def _ranges(tenants: Counter[Pages]) -> list[_Range]:
    """Return one range for each set of tensors that share pages, in the order of addresses."""
    found: list[Counter[Pages]] = []
    end = 0
    for pages in sorted(tenants):
        if pages[0] >= end:
            found.append(Counter())
        found[-1][pages] = tenants[pages]
        end = max(end, pages[1])
    return [_Range(_hull(some), some) for some in found]


class PinnedTensors:
    """Keeps the pages of tensors registered, and these tensors alive.

    A finaliser may call `unpin`, in any thread and in the middle of another call.
    """

    def __init__(
        self,
        register: Callable[[int, int], object],
        unregister: Callable[[int], object],
        settle: Callable[[], object],
    ) -> None:
        self._ranges = PageRanges(register, unregister, settle)
        self._kept: dict[int, list[torch.Tensor]] = {}  # The pinned tensors, by address.
        self._leaving: deque[torch.Tensor] = deque()
        self._busy = Lock()

    def pin(self, tensor: torch.Tensor) -> None:
        """Pin a contiguous tensor on the CPU. Raises what registering raises."""
        if tensor.nbytes == 0:
            return
        try:
            with self._busy:
                self._ranges.add(tensor.data_ptr(), tensor.nbytes)
                self._kept.setdefault(tensor.data_ptr(), []).append(tensor)
        finally:
            self._let_go()

    def unpin(self, tensor: torch.Tensor) -> None:
        """Undo one `pin`. Raises ValueError if the tensor is not pinned."""
        if tensor.nbytes == 0:
            return
        same = self._kept.get(tensor.data_ptr(), [])
        if not any(kept.nbytes == tensor.nbytes for kept in same):
            raise ValueError(f"a tensor of {tensor.nbytes} bytes was never pinned")
        self._leaving.append(tensor)
        self._let_go()

    def _let_go(self) -> None:
        # If another call holds the lock, be it of this thread, that call does this when it ends.
        while self._leaving and self._busy.acquire(blocking=False):
            try:
                tensor = self._leaving.popleft()
                same = self._kept[tensor.data_ptr()]
                place = next(i for i, kept in enumerate(same) if kept.nbytes == tensor.nbytes)
                kept = same.pop(place)
                if not same:
                    del self._kept[tensor.data_ptr()]
                self._ranges.remove(kept.data_ptr(), kept.nbytes)
            finally:
                self._busy.release()
