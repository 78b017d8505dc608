"""The pairs of a token and an expert of a batch, in the order of the experts."""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Self

import torch

__all__ = ["Pairs"]


@dataclass(frozen=True)
class Pairs:
    """The pairs of a token and a slot of a batch, sorted by their experts. P is M * k."""

    experts: torch.Tensor
    """int64 [P]: the expert of each pair. Skipped slots, with -1, come first."""
    slots: torch.Tensor
    """int64 [P]: the token times k plus the slot."""
    weights: torch.Tensor
    """float32 [P, 1]: the router's weight."""
    starts_on_device: torch.Tensor
    """int64 [E + 1]: starts[e] is the first pair of expert e; starts[E] ends the last one's."""
    places: torch.Tensor
    """int64 [P]: where each slot is in this order."""
    topk: int

    @classmethod
    def sort(cls, topk_ids: torch.Tensor, topk_weights: torch.Tensor, experts: int) -> Self:
        """Sort topk_ids [M, k] and topk_weights [M, k] by experts, without a wait for the device.

        Ids beyond `experts` come last, and belong to no expert.
        """
        of_pairs, slots = topk_ids.flatten().long().sort(stable=True)
        # The search, unlike torch.bincount, does not make the host wait for the device.
        bounds = torch.arange(experts + 1, device=topk_ids.device)
        starts = torch.searchsorted(of_pairs, bounds)
        weights = topk_weights.flatten()[slots].unsqueeze(1)
        places = torch.empty_like(slots)
        places[slots] = torch.arange(len(slots), device=slots.device)
        return cls(of_pairs, slots, weights, starts, places, topk_ids.shape[1])

    @cached_property
    def starts(self) -> list[int]:
        """`starts_on_device` on the host, which waits for the device once to learn them.

        Raises ValueError for an id that is neither an expert nor -1.
        """
        experts = len(self.starts_on_device) - 1
        ends = (self.experts[:1], self.experts[-1:])
        numbers = torch.cat((self.starts_on_device, *ends)).tolist()
        for wrong in numbers[experts + 1 :]:
            if not -1 <= wrong < experts:
                raise ValueError(f"topk_ids has {wrong}, must be -1 or in [0, {experts})")
        return numbers[: experts + 1]

    def counts(self) -> list[int]:
        """The number of tokens of each expert."""
        return [end - begin for begin, end in pairwise(self.starts)]
