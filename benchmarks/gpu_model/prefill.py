"""Prefill: the staging ring queues its copies for all layers of a model in virtual time."""

from dataclasses import dataclass
from random import Random

from benchmarks.gpu_model.accelerator import SimulatedAccelerator
from benchmarks.gpu_model.layers import Parts
from benchmarks.gpu_model.models import CHUNK, host_tensors
from lvllm.gpu.break_even import Point, search, threshold
from lvllm.gpu.offloaded_layer import ComputePath, choose_path
from lvllm.gpu.ring import StagingRing
from lvllm.gpu.streamed import SUM_BYTES
from lvllm.planning.shape import LayerShape
from lvllm.units import GIB, ceil_div

__all__ = ["Prefill", "Spent"]

AHEAD = 1
"""LVLLM_GPU_PREFETCH_WINDOW."""
MOST = 32768
"""The largest batch for which the break-even is looked for."""


@dataclass(frozen=True)
class Spent:
    """What a prompt took, in seconds."""

    seconds: float
    bus: float
    """In which the bus copied experts."""
    gpu: float
    """In which the GPU computed."""
    lk: float
    """In which the GPU waited for lk."""

    @property
    def bound(self) -> str:
        """What was busy for longest."""
        parts = {"bus": self.bus, "GPU": self.gpu, "lk": self.lk}
        return max(parts, key=lambda name: parts[name])


class Prefill:
    """The lane of one card, with its part of each layer.

    Args:
        parts: the model and the machine.
        staging: LVLLM_GPU_STAGING_MIB in bytes.
    """

    def __init__(self, parts: Parts, staging: int = GIB) -> None:
        self.parts, self.accelerator = parts, SimulatedAccelerator(parts.bus)
        shape, cards = parts.model, parts.machine.gpus
        weights = {
            layer.number: host_tensors(layer, shape.bits.experts, cards)
            for layer in shape.moe_layers
        }
        self._ring = StagingRing(self.accelerator, weights, AHEAD, staging)
        self._lk = 0.0
        self._random = Random(1)
        self.threshold = self._break_even(shape.moe_layers[0])

    def prompt(self, tokens: int, chunk: int = CHUNK) -> Spent:
        """Compute a prompt behind another one, whose last layer left the first experts here."""
        self._pass(min(tokens, chunk), 0.0)
        device = self.accelerator
        device.synchronize(device.compute())
        before = device.now, device.to_device.busy, device.compute().busy, self._lk
        for done in range(0, tokens, chunk):
            size = min(chunk, tokens - done)
            self._pass(size, done + size / 2)
            device.synchronize(device.compute())
            device.now += self.parts.overheads.step
        after = device.now, device.to_device.busy, device.compute().busy, self._lk
        seconds, bus, gpu, lk = (end - begin for begin, end in zip(before, after, strict=True))
        return Spent(seconds, bus, gpu - lk, lk)

    def point(self, layer: LayerShape, tokens: int) -> Point:
        """What a batch of one layer takes on both paths, as LvLLM's start measures it."""
        device = self.accelerator
        self._ring.abort()
        self._ring.settle()
        device.synchronize(device.compute())
        begin = device.now
        self._stream(layer, tokens)
        device.synchronize(device.compute())
        cpu = self.parts.handed_over(tokens) + self.parts.lk(layer, tokens)
        return Point(tokens, cpu, device.now - begin)

    def break_even_of_prompts(self) -> int:
        """From how many tokens on a whole prompt is faster streamed than on lk."""
        chosen = self.threshold

        def point(tokens: int) -> Point:
            seconds = []
            for self.threshold in (0, 1):
                seconds.append(self.prompt(tokens).seconds)
            return Point(tokens, *seconds)

        found = threshold(search(point, CHUNK), CHUNK)
        self.threshold = chosen
        return found

    def _break_even(self, layer: LayerShape) -> int:
        found = threshold(search(lambda tokens: self.point(layer, tokens), MOST), MOST)
        self._ring.abort()
        return found

    def _pass(self, tokens: int, back: float) -> None:
        device, parts = self.accelerator, self.parts
        stream = device.compute()
        for layer in parts.model.layers:
            device.launch(parts.dense(layer, tokens, 1, back), stream)
            if not layer.experts:
                continue
            if choose_path(tokens, False, self.threshold) is ComputePath.STREAMED:
                self._stream(layer, tokens)
            else:
                seconds = parts.handed_over(tokens) + parts.lk(layer, tokens)
                self._lk += seconds
                device.launch(seconds, stream)
        device.launch(parts.head(1), stream)

    def _stream(self, layer: LayerShape, tokens: int) -> None:
        """Compute a batch as lvllm/gpu/streamed.py does, with made-up routing."""
        device = self.accelerator
        pieces = max(1, ceil_div(tokens, SUM_BYTES // (4 * self.parts.model.hidden)))
        for _ in range(pieces):
            rows = ceil_div(tokens, pieces)
            device.synchronize(device.compute())  # The host learns how many tokens experts have.
            chance = layer.read(rows) / layer.routed
            counts = [int(self._random.random() < chance) for _ in range(layer.experts)]
            # The chosen experts share the products evenly.
            each = self.parts.products(layer, rows) / max(1, sum(counts))
            for some, _ in self._ring.stream(layer.number, counts):
                taken = sum(counts[some.start : some.stop])
                device.launch(taken * each, device.compute())
