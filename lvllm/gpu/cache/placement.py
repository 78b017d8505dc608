"""Chooses which experts lie on the GPU, by how often each one was read.

An expert that is read in a step costs the CPU the time to read its weights once, however many
tokens of the step take it. So what is counted are steps, not tokens. Counts are halved in time,
since what a server is asked changes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["Move", "Placement"]

HALF_LIFE = 512
"""The steps in which a count loses half of its weight: some twenty seconds of decoding."""
MARGIN = 1.25
"""An expert takes another one's place only if it was read so many times as often. Chance alone
makes two experts that are read alike differ by a quarter after some 60 reads, and a move takes the
bus the time of a read."""


@dataclass(frozen=True)
class Move:
    """An expert that is to be copied to a slot, and the one that has the slot now."""

    layer: int
    expert: int
    slot: int
    out: tuple[int, int] | None
    """The layer and the expert that leave the slot; None: it is free."""


class Placement:
    """The experts in the slots of a GPU. All slots are of one size, and take experts of any layer.

    Args:
        layers: the number of layers.
        experts: the number of experts of each layer.
        slots: the number of experts that have room.
    """

    def __init__(self, layers: int, experts: int, slots: int) -> None:
        self.scores = torch.zeros(layers, experts, dtype=torch.float32)
        """float32 [layers, experts]: the steps in which each expert was read, halved in time."""
        self.table = torch.full((layers, experts), -1, dtype=torch.int32)
        """int32 [layers, experts]: the slot of each expert, or -1."""
        self._free = list(range(min(slots, layers * experts)))[::-1]

    def count(self, reads: torch.Tensor, steps: int) -> None:
        """Count `reads` [layers, experts], in how many of the last `steps` each expert was read."""
        self.scores *= 0.5 ** (steps / HALF_LIFE)
        self.scores += reads

    def moves(self, most: int) -> Sequence[Move]:
        """Return up to `most` moves, those that gain most first. They count as made from now on."""
        flat, table = self.scores.flatten(), self.table.flatten()
        inside = (table >= 0).nonzero().flatten()
        outside = (table < 0).nonzero().flatten()
        wanted = outside[flat[outside].argsort(descending=True, stable=True)[:most]].tolist()
        least = inside[flat[inside].argsort(stable=True)[:most]].tolist()
        found = []
        for expert in wanted:
            score = float(flat[expert])
            if self._free:
                found.append(self._move(expert, None))
            elif least and score > MARGIN * float(flat[least[0]]):
                found.append(self._move(expert, least.pop(0)))
            else:
                break
        return found

    def _move(self, number: int, out: int | None) -> Move:
        """Put an expert in a free slot, or in the slot of `out`. Both are numbers in all layers."""
        experts = self.table.shape[1]
        (layer, expert), leaves = divmod(number, experts), None
        if out is None:
            slot = self._free.pop()
        else:
            leaves = divmod(out, experts)
            slot = int(self.table[leaves])
            self.table[leaves] = -1
        self.table[layer, expert] = slot
        return Move(layer, expert, slot, leaves)
