"""Replaces experts in slots while steps run.

A table on the device says which slot each expert has. Steps read it, also in graphs. An expert is
replaced in two parts. First the table loses the one that leaves, in the order of the steps, and the
copy of the other one waits until all steps are done that could read the slot. The table gets the
new expert when its copy has been seen to be done. So no step ever waits for a copy.
"""

from collections import deque
from collections.abc import Iterable, Sequence

import torch

from lvllm.gpu.accelerator import Accelerator, Event, Stream
from lvllm.gpu.cache.placement import Move
from lvllm.gpu.cache.slots import Slots
from lvllm.gpu.groups import LayerWeights

__all__ = ["STEP_BYTES", "Replacing"]

STEP_BYTES = 32 << 20
"""The most that is copied after a step. A bus of 55 GB/s takes 0.6 ms for it, beside the next step,
and the copies take that much of the host memory's bandwidth from lk."""


class Replacing:
    """The slots' experts.

    Args:
        accelerator: the device.
        layers: the tensors of each layer's experts on the host, pinned.
        experts: the number of experts of each layer.
        slots: the room for experts.
        copies: the stream that writes the slots.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        layers: Sequence[LayerWeights],
        experts: int,
        slots: Slots,
        copies: Stream,
    ) -> None:
        self._accelerator, self._layers = accelerator, layers
        self._slots, self._copies = slots, copies
        shape = (len(layers), experts)
        self.on_host = torch.full(shape, -1, dtype=torch.int32)
        """int32 [layers, experts]: the table as work sees it that is queued from now on."""
        self.on_device = torch.full(shape, -1, dtype=torch.int32, device=accelerator.device)
        """The slot of each expert, or -1."""
        self.moved = 0
        """The bytes of all copies that are done."""
        self._waiting: deque[Move] = deque()
        self._copying: tuple[list[Move], Event] | None = None
        # Tables in pinned memory, each of which lives until the device has read it.
        self._tables: deque[tuple[torch.Tensor, Event]] = deque()

    @property
    def idle(self) -> bool:
        """Whether all moves are done."""
        return not self._waiting and self._copying is None

    def add(self, moves: Iterable[Move]) -> None:
        """Add moves to those that wait."""
        self._waiting.extend(moves)

    def step(self, most: int = STEP_BYTES) -> bool:
        """Go on between two steps, with copies of up to `most` bytes, and of at least one expert.

        Returns whether an expert has lost its slot. Work that was queued earlier still finds it.
        """
        changed = left = False
        if self._copying is not None and self._accelerator.reached(self._copying[1]):
            self._arrive()
            changed = True
        moves: list[Move] = []
        if self._copying is None:
            count = max(1, most * self._slots.count // self._slots.nbytes)
            moves = [self._waiting.popleft() for _ in range(min(count, len(self._waiting)))]
        for move in moves:
            if move.out is not None:
                self.on_host[move.out] = -1
                changed = left = True
        if changed:
            self._upload()
        if moves:
            self._copying = (moves, self._copy(moves))
        return left

    def settle(self) -> None:
        """Make all moves, and wait for them. This is for the start, before the first step."""
        while not self.idle:
            self.step(self._slots.nbytes)
            self._accelerator.synchronize(self._copies)

    def _upload(self) -> None:
        """Queue the device's new table. A kernel reads it, so it waits for no copy of experts."""
        accelerator, compute = self._accelerator, self._accelerator.compute()
        table = accelerator.pinned(self.on_host.shape, torch.int32).copy_(self.on_host)
        accelerator.exchange([(self.on_device, table)], compute)
        read = accelerator.event()
        accelerator.record(read, compute)
        while self._tables and accelerator.reached(self._tables[0][1]):
            self._tables.popleft()
        self._tables.append((table, read))

    def _copy(self, moves: Sequence[Move]) -> Event:
        """Queue the copies behind all that may read their slots; return the event of their end."""
        accelerator = self._accelerator
        free, copied = accelerator.event(), accelerator.event()
        accelerator.record(free, accelerator.compute())
        accelerator.wait(free, self._copies)
        for move in moves:
            for name, of in self._layers[move.layer].items():
                target = self._slots.tensors[name][move.slot]
                accelerator.copy(target, of[move.expert], self._copies)
                self.moved += target.nbytes
        accelerator.record(copied, self._copies)
        return copied

    def _arrive(self) -> None:
        """Note the experts whose copies are done."""
        assert self._copying is not None, "asked only while experts are copied"
        moves, copied = self._copying
        self._copying = None
        # It was reached, so this costs nothing; it makes what was copied visible to later work.
        self._accelerator.wait(copied, self._accelerator.compute())
        for move in moves:
            self.on_host[move.layer, move.expert] = move.slot
