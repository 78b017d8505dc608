"""Which pages of host memory are registered with a GPU: each once, while a tensor lies in it.

CUDA registers ranges, in whole pages, and refuses one that has a page in common with another. Large
tensors have pages to themselves, but biases and scales lie side by side, also those of different
layers; and what is copied has to lie in one range. So a range is what tensors that share pages
cover together, and no page more: memory that was given back may become other pages at the same
addresses, which a device that kept the old ones would not see.
"""

import mmap
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from threading import Lock

import torch

__all__ = ["PageRanges", "PinnedTensors"]

Pages = tuple[int, int]
"""Addresses of the first byte and of the one behind the last, multiples of a page."""


@dataclass(frozen=True)
class _Range:
    """Pages that are registered together, and those of each tensor in them."""

    pages: Pages
    tenants: Counter[Pages]


class PageRanges:
    """Keeps registered what tensors lie in.

    Args:
        register: a range, by address and size. What it raises leaves all as it was before.
        unregister: by address.
        settle: waits for all copies; called before anything is unregistered.
        page: bytes.
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
        self._ranges: list[_Range] = []  # in the order of addresses

    def add(self, address: int, size: int) -> None:
        """Tensors may lie in each other."""
        pages = self._pages(address, size)
        old = [one for one in self._ranges if one.pages[0] < pages[1] and pages[0] < one.pages[1]]
        tenants = sum((one.tenants for one in old), Counter([pages]))
        self._replace(old, [_Range(_hull(tenants), tenants)])

    def remove(self, address: int, size: int) -> None:
        """Of a tensor that was added, and lies in memory still."""
        pages = self._pages(address, size)
        place = bisect_right(self._ranges, pages[0], key=lambda one: one.pages[0]) - 1
        old = self._ranges[place]
        self._replace([old], _ranges(old.tenants - Counter([pages])))

    def _pages(self, address: int, size: int) -> Pages:
        return address // self._page * self._page, -(-(address + size) // self._page) * self._page

    def _replace(self, old: list[_Range], new: list[_Range]) -> None:
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
    return min(begin for begin, _ in tenants), max(end for _, end in tenants)


def _ranges(tenants: Counter[Pages]) -> list[_Range]:
    """Those of tensors that have pages in common, one after the other."""
    found: list[Counter[Pages]] = []
    end = 0
    for pages in sorted(tenants):
        if pages[0] >= end:
            found.append(Counter())
        found[-1][pages] = tenants[pages]
        end = max(end, pages[1])
    return [_Range(_hull(some), some) for some in found]


class PinnedTensors:
    """The same for tensors, which live as long as their pages are registered.

    `unpin` may be called by a finaliser: in any thread, in the middle of anything.
    """

    def __init__(
        self,
        register: Callable[[int, int], object],
        unregister: Callable[[int], object],
        settle: Callable[[], object],
    ) -> None:
        self._ranges = PageRanges(register, unregister, settle)
        self._kept: dict[int, list[torch.Tensor]] = {}  # by address
        self._leaving: deque[torch.Tensor] = deque()
        self._busy = Lock()

    def pin(self, tensor: torch.Tensor) -> None:
        """A contiguous one on the CPU. Raises what registering raises."""
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
        # Who is in the middle of something, maybe this thread, will go on with it.
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
