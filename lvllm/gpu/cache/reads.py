"""Counts on the device in which batches each expert is read, and brings the counts to the host."""

from collections.abc import Sequence

import torch

from lvllm.gpu.accelerator import Accelerator, Event

__all__ = ["EVERY", "Reads"]

EVERY = 32
"""The steps between two looks at the counts: a quarter of a second of decoding."""


class Reads:
    """How many batches read each expert.

    Args:
        accelerator: the device.
        shape: the number of layers and the number of experts of each.
    """

    def __init__(self, accelerator: Accelerator, shape: Sequence[int]) -> None:
        self._accelerator = accelerator
        self.on_device = torch.zeros(shape, dtype=torch.int32, device=accelerator.device)
        """int32 [layers, experts], to which batches are added."""
        self._on_host = accelerator.pinned(shape, torch.int32)
        self._copied: Event | None = None
        self._steps = 0

    def step(self) -> torch.Tensor | None:
        """Return int32 [layers, experts], the batches of some EVERY steps, when they are known.

        The caller uses the result before the next step. Nothing waits for the device.
        """
        self._steps += 1
        accelerator = self._accelerator
        if self._copied is not None:
            if not accelerator.reached(self._copied):
                return None
            self._copied = None
            return self._on_host
        if self._steps >= EVERY:
            self._steps = 0
            compute = accelerator.compute()
            accelerator.exchange([(self._on_host, self.on_device)], compute)
            self.on_device.zero_()
            self._copied = accelerator.event()
            accelerator.record(self._copied, compute)
        return None
