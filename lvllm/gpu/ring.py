"""Copies experts to the device through a ring of memory, while others are computed.

Experts come in groups of some megabytes (groups.py), whatever layer they belong to. So the ring may
be smaller than a layer: DeepSeek-V3's experts of one layer in 4 bits take 5.8 GiB. The groups of
the layer that is computed are followed by those of the next layers, as far as there is room.

Two streams take part. The copy stream writes groups, and the compute stream, in which the caller
works, reads them. Each group has two events. The compute stream waits for `copied` before it reads.
`released` is recorded after the last read, and the copy stream waits for it before it writes the
same bytes again. The host waits for neither.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from lvllm.gpu.accelerator import Accelerator, Event, Mark
from lvllm.gpu.copy_times import CopyTimes, GroupTimes
from lvllm.gpu.counters import StreamedCounters
from lvllm.gpu.groups import LayerGroups, LayerWeights
from lvllm.gpu.spans import Freed, Spans
from lvllm.gpu.watchdog import Watchdog
from lvllm.units import amount

__all__ = ["StagingRing"]

AT_ONCE = 4
"""The groups that are queued before the next one is computed. The host takes some 20 us for each. A
layer of 256 experts in large groups would take it 5 ms, in which the device would wait."""


@dataclass
class _Unmarked:
    """Copies of a layer of which the watchdog has not been told."""

    layer: int
    first: int
    """The number of the first one."""
    behind: str = ""
    """What some of them wait for."""

    def name(self) -> str:
        behind = f", behind {self.behind}," if self.behind else ""
        return f"layer {self.layer}: copy to the GPU{behind}"


@dataclass
class _Group:
    """A group that is copied or being copied."""

    place: int
    """The place of its layer in the order of computation."""
    experts: range
    tensors: dict[str, torch.Tensor]
    copied: Event
    marks: tuple[Mark, Mark] | None
    """Around the copy, if the layer is counted."""
    number: int
    """Copies are numbered in the order in which they are queued."""
    ahead: bool = False
    """Whether the copy had been queued before its layer was asked for."""


class StagingRing:
    """Copies the streamed layers' experts to the device, those of the next layers ahead of time.

    Args:
        accelerator: the device that is copied to.
        layers: the streamed layers, by their numbers in the model, in the order of computation.
            Their tensors are contiguous, on the CPU and pinned, and nobody writes them.
        ahead: LVLLM_GPU_PREFETCH_WINDOW, the number of layers that are copied ahead.
        limit: LVLLM_GPU_STAGING_MIB in bytes. The ring is smaller if `ahead` + 1 layers are, and
            larger if two groups are.
        watchdog: to be told of each copy.

    A pass over the layers may begin and end at any layer. After the last layer the first one is
    copied again, so that the next pass finds its first experts there. Only one thread uses a ring.

    Raises:
        ValueError: for a negative `ahead`, or tensors that LayerGroups refuses.
        MemoryError: if the device has no room for the ring. The message has the numbers.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        layers: Mapping[int, LayerWeights],
        ahead: int,
        limit: int,
        watchdog: Watchdog | None = None,
    ) -> None:
        if ahead < 0:
            raise ValueError(f"ahead is {ahead}, must be at least 0")
        self._accelerator = accelerator
        self._layers = [LayerGroups(number, weights) for number, weights in layers.items()]
        self._places = {layer.number: place for place, layer in enumerate(self._layers)}
        self._ahead = min(ahead, max(len(self._layers) - 1, 0))
        self._copies = accelerator.stream()
        self._steps = watchdog.follow(self._copies) if watchdog is not None else None
        self._awaited = ""  # what the copies waited for last
        self._queued = 0  # copies
        self._unmarked: _Unmarked | None = None
        self._spans = Spans(self._size(limit))
        self._memory = self._allocate()
        # These are copied or being copied, in the order of computation.
        self._coming: deque[_Group] = deque()
        self._left: Iterator[tuple[int, range]] = iter(())
        self._next: tuple[int, range] | None = None
        self._holds: Callable[[int], Sequence[bool] | None] = lambda layer: None
        self._counters: dict[int, StreamedCounters] = {}
        self._times = CopyTimes(accelerator)

    @property
    def staging_bytes(self) -> int:
        """The size of the ring."""
        return self._spans.size

    def count(self, layer: int, counters: StreamedCounters) -> None:
        """From now on, count the copies of this layer and the times around them."""
        self._counters[self._places[layer]] = counters

    def leave_out(self, holds: Callable[[int], Sequence[bool] | None]) -> None:
        """From now on, copy no expert ahead that the device holds already.

        `holds` tells of a layer's experts which ones these are; None: none is. When the device no
        longer holds one of them, the caller has to `abort` before the next batch.
        """
        self._holds = holds

    def tally(self) -> None:
        """Count the groups that have been computed by now.

        This must not be called while a graph is captured.
        """
        self._times.tally()

    def stream(
        self, layer: int, counts: Sequence[int], *, ahead: bool = True
    ) -> Iterator[tuple[range, dict[str, torch.Tensor]]]:
        """Yield groups of the layer's experts, and their tensors on the device, in rising order.

        `counts` has the number of tokens of each expert. Experts without tokens are not copied,
        unless they were copied ahead. The compute stream waits for each group's copy. When the
        caller asks for the next group, all work that reads this one is in the compute stream.
        `ahead` says whether the next layers are copied behind this one.

        Raises ValueError for a layer that is not streamed, and RuntimeError while a graph is
        captured: the graph would read bytes that hold other experts during a replay.
        """
        place = self._places.get(layer)
        if place is None:
            raise ValueError(f"layer {layer} is not streamed; those that are: {[*self._places]}")
        if self._accelerator.capturing():
            raise RuntimeError(f"layer {layer} cannot be streamed while a graph is captured")
        # Drop what was copied for layers that this pass leaves out, or for a pass that has ended.
        while self._coming and self._coming[0].place != place:
            self._coming.popleft()
            self._spans.give_back(None)
        for group in self._coming:
            group.ahead = group.ahead or group.place == place
        self._left = self._after_coming(place, counts, self._ahead if ahead else 0)
        self._next = next(self._left, None)
        self._fill(AT_ONCE)
        while self._coming and self._coming[0].place == place:
            group = self._coming[0]
            released = None
            if any(counts[expert] for expert in group.experts):
                if self._unmarked is not None and group.number >= self._unmarked.first:
                    self._mark()
                stream = self._accelerator.compute()
                asked = self._accelerator.mark(stream) if group.marks else None
                self._accelerator.wait(group.copied, stream)
                yield group.experts, group.tensors
                released = self._accelerator.event()
                self._accelerator.record(released, stream)
                self._time(group, asked)
            self._coming.popleft()
            self._spans.give_back(released, f"layer {layer}: experts on the GPU")
            self._fill(AT_ONCE)
        self._fill()  # The device has the layer's products to compute by now.

    def abort(self) -> None:
        """End the pass here, once all work of it is in the compute stream."""
        released = self._accelerator.event()
        self._accelerator.record(released, self._accelerator.compute())
        while self._coming:
            group = self._coming.popleft()
            what = f"layer {self._layers[group.place].number}: experts on the GPU"
            self._spans.give_back(released, what)

    def settle(self) -> None:
        """Make the caller wait for all copies that are queued."""
        self._accelerator.synchronize(self._copies)

    def _size(self, limit: int) -> int:
        """Return the bytes that `ahead` + 1 layers need, at most `limit` or two groups."""
        if not self._layers:
            return 0
        needed = (self._ahead + 1) * max(
            sum(layer.size(len(some)) for some in layer.divide(range(layer.experts)))
            for layer in self._layers
        )
        # One group is copied while another one is computed.
        two = 2 * max(layer.size(layer.most) for layer in self._layers)
        return min(needed, max(limit, two))

    def _allocate(self) -> torch.Tensor:
        size = self._spans.size
        try:
            return self._accelerator.memory_for(size, self._copies)
        except MemoryError as error:
            raise MemoryError(
                f"copies of experts take {amount(size)} on the GPU: {error}; a smaller"
                " LVLLM_GPU_STAGING_MIB, or fewer layers in LVLLM_GPU_RESIDENT_MOE_LAYERS, needs"
                " less"
            ) from None

    def _after_coming(
        self, place: int, counts: Sequence[int], ahead: int
    ) -> Iterator[tuple[int, range]]:
        """Yield the groups to be copied behind those that are coming: the layer's, then others'."""
        first, begin = 0, 0
        if self._coming:
            first = (self._coming[-1].place - place) % len(self._layers)
            begin = self._coming[-1].experts.stop
        for step in range(first, ahead + 1):
            at = (place + step) % len(self._layers)
            layer = self._layers[at]
            wanted: Sequence[int] | None = counts
            if step > 0:
                held = self._holds(layer.number)
                wanted = None if held is None else [not held_now for held_now in held]
            for some in layer.divide(range(begin, layer.experts), wanted):
                yield at, some
            begin = 0

    def _fill(self, most: int | None = None) -> None:
        """Queue up to `most` copies, or all, as long as there is room."""
        queued = 0
        while self._next is not None and queued != most:
            place, some = self._next
            taken = self._spans.take(self._layers[place].size(len(some)))
            if taken is None:
                return
            begin, before = taken
            self._await(place, before)
            self._coming.append(self._copy(place, some, begin))
            self._next = next(self._left, None)
            queued += 1

    def _copy(self, place: int, some: range, begin: int) -> _Group:
        """Queue the copy of a group to the ring's byte `begin`."""
        accelerator, layer = self._accelerator, self._layers[place]
        tensors = layer.views(some, self._memory[begin:])
        self._unmarked = self._unmarked or _Unmarked(layer.number, self._queued)
        self._queued += 1
        counted = place in self._counters
        begun = accelerator.mark(self._copies) if counted else None
        for name, source in layer.sources(some).items():
            accelerator.copy(tensors[name], source, self._copies)
        marks = (begun, accelerator.mark(self._copies)) if counted else None
        copied = accelerator.event()
        accelerator.record(copied, self._copies)
        return _Group(place, some, tensors, copied, marks, self._queued - 1)

    def _await(self, place: int, before: Freed | None) -> None:
        """Queue the wait of a copy of a layer for the last reads of the bytes that it writes.

        The watchdog is told of the first wait for a layer's products, and before that of the copies
        that do not wait for it.
        """
        number, unmarked = self._layers[place].number, self._unmarked
        first = before is not None and before.what != self._awaited
        if unmarked is not None and (first or unmarked.layer != number):
            self._mark()
        if before is None:
            return
        self._accelerator.wait(before.released, self._copies)
        if not first:
            self._unmarked = self._unmarked or _Unmarked(number, self._queued)
            self._unmarked.behind = before.what
            return
        self._awaited = before.what
        if self._steps is not None:
            self._steps.mark(before.what)

    def _mark(self) -> None:
        """Tell the watchdog of all copies that are queued, before the compute stream waits for one.

        The device copies four bytes back for it. It would do so every 0.3 ms if each group had a
        mark. The copies of a layer have one or two, as many are queued before one is waited for.
        """
        if self._steps is not None and self._unmarked is not None:
            self._steps.mark(self._unmarked.name())
        self._unmarked = None

    def _time(self, group: _Group, asked: Mark | None) -> None:
        """Mark the end of the group's work, which is in the compute stream by now."""
        if asked is None or group.marks is None:
            return
        self.tally()
        computed = self._accelerator.mark(self._accelerator.compute())
        size = sum(tensor.nbytes for tensor in group.tensors.values())
        counters = self._counters[group.place]
        self._times.add(GroupTimes(counters, size, group.ahead, *group.marks, asked, computed))
