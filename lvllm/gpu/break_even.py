"""Measures the break-even batch size, from which on it is faster to copy a layer to the device than
to compute it with lk. LVLLM_GPU_PREFILL_MIN_BATCH_SIZE=auto measures one layer at start.

On the CPU a layer takes lk's time and the time to copy the tokens there and back. A streamed layer
takes the longer of its copy and its products, and a little more: nothing is copied ahead here, so
that the first group's copy or the last one's products are not hidden. What both paths have in
common is left out.

Then the same is done with batches that the CPU and the device share (shares.py), since near the
break-even each of them can take half.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, isqrt

import torch

from lvllm.gpu import shared, streamed
from lvllm.gpu.offloaded_layer import OffloadedLayer
from lvllm.gpu.ring import StagingRing
from lvllm.gpu.shares import Rates, fit

__all__ = [
    "MeasuredThreshold",
    "Point",
    "measure_threshold",
    "search",
    "threshold",
]

# vLLM shows the loggers of this name. This package works without vLLM.
logger = logging.getLogger("vllm.plugins.lvllm")

SECONDS = 2.0
"""The time that all measured batches may take, of a start that takes minutes."""
ENOUGH = 0.05
"""A part that takes this long is measured once. Shorter parts are measured up to three times."""
WARM_UP = 256
"""Tokens of a first batch that does not count: it loads kernels and compiles those of Triton."""
SAVES = 0.95
"""A shared batch has to take at most this part of the CPU's time. Two runs differ by less."""
PRECISION = 8
"""The interval around the break-even is halved until it is an eighth of its end. A layer's time
differs by more than that between batches that choose different experts."""


@dataclass(frozen=True)
class MeasuredThreshold:
    """A threshold that is to be measured.

    Attributes:
        dtype: the dtype of activations.
        agree: returns the largest of each number among the ranks that hold parts of the same
            layers. All of them call it together. A step takes as long as its slowest rank, so the
            slowest rank decides, and all ranks measure the same batches and choose the same
            threshold. (If a rank chose another path, its part of the sum would be as correct, but
            rounded in another way. Stages of a pipeline have different layers, and may differ.)
        least: the smallest threshold that may be chosen.
    """

    dtype: torch.dtype
    agree: Callable[[Sequence[float]], Sequence[float]] = tuple
    least: int = 1


@dataclass(frozen=True)
class Point:
    """The seconds that a layer takes for a batch of `tokens`, on the CPU and streamed."""

    tokens: int
    cpu: float
    streamed: float

    @property
    def gain(self) -> float:
        """The seconds that streaming saves."""
        return self.cpu - self.streamed


def search(measure: Callable[[int], Point | None], most: int) -> list[Point]:
    """Measure points on both sides of the break-even, in batches of 1 to `most` tokens.

    Batch sizes double until streaming is faster twice in a row, since once may be chance. Then they
    halve the interval. The search ends early when `measure` returns None: no time is left.
    """
    points: list[Point] = []
    tokens = 1
    while (point := measure(tokens)) is not None:
        points.append(point)
        below, above = _around(points)
        largest = max(point.tokens for point in points)
        if len(above) < 2 and largest < most:
            tokens = min(2 * largest, most)
            continue
        lower = below.tokens if below else 0
        if not above or above[0].tokens - lower <= max(1, above[0].tokens // PRECISION):
            break
        tokens = max(lower + 1, isqrt(lower * above[0].tokens))
    return points


def threshold(points: Sequence[Point], most: int) -> int:
    """Return the smallest batch from which on streaming is not slower; 0 if it is beyond `most`.

    The gain is taken to be linear between two points, and beyond the last point if time ran out.
    """
    below, above = _around(points)
    if below is None:
        return above[0].tokens if above else 0
    if above:
        other = above[0]
    else:
        other = max((p for p in points if p is not below), key=lambda p: p.tokens, default=below)
    rise = other.gain - below.gain
    if other is below or rise * (other.tokens - below.tokens) <= 0:
        return 0
    crossing = ceil(below.tokens - below.gain * (other.tokens - below.tokens) / rise)
    return crossing if crossing <= most else 0


def _around(points: Sequence[Point]) -> tuple[Point | None, list[Point]]:
    """Return the largest batch that is not faster streamed, and all larger ones in order."""
    ordered = sorted(points, key=lambda point: point.tokens)
    slower = [place for place, point in enumerate(ordered) if point.gain <= 0]
    if not slower:
        return None, ordered
    return ordered[slower[-1]], ordered[slower[-1] + 1 :]


def measure_threshold(
    measured: MeasuredThreshold,
    ring: StagingRing,
    layer: OffloadedLayer,
    layers: int,
    most: int,
) -> tuple[int, Rates | None]:
    """Measure one of `layers` layers in batches of up to `most` tokens.

    Returns the threshold, which is 0 if streaming does not pay, and rates if larger batches are to
    be divided between the CPU and the device. One line of the log says what was found. All ranks
    measure at the same time, as they compute at the same time: they share the host's memory, and
    some of them share a bus.
    """
    timer = _LayerTimer(measured.dtype, ring, layer)
    timer.warm_up(min(most, WARM_UP))
    measured.agree((0.0,))  # This makes the ranks begin together.
    (copy,) = measured.agree((timer.copy(),))
    known: list[Point] = []

    def measure(tokens: int) -> Point:
        batch = timer.batch(tokens)
        (cpu,) = measured.agree((timer.cpu(*batch),))
        # More tokens take at least as long, and so does the copy of the experts that they choose.
        # If the CPU is faster than that, the device need not be measured.
        chosen = 1 - (1 - layer.topk / layer.routed) ** tokens
        least = max([chosen * copy, *(one.streamed for one in known if one.tokens < tokens)])
        if cpu > least:
            (least,) = measured.agree((timer.streamed(*batch),))
        known.append(Point(tokens, cpu, least))
        return known[-1]

    points = search(_within_time(measured, measure), most)
    chosen = threshold(points, most)
    rates = _rates(layer, copy, points)
    cpu_seconds = {point.tokens: point.cpu for point in points}

    def measure_shared(tokens: int) -> Point:
        batch = timer.batch(tokens)
        if tokens not in cpu_seconds:
            (cpu_seconds[tokens],) = measured.agree((timer.cpu(*batch),))
        (both,) = measured.agree((timer.shared(rates, *batch),))
        return Point(tokens, SAVES * cpu_seconds[tokens], both)

    divided = threshold(search(_within_time(measured, measure_shared), most), most)
    timer.drop()
    shares = 0 < divided < (chosen or most + 1)
    if shares:
        chosen = divided
    if 0 < chosen < measured.least:
        chosen = measured.least if measured.least <= most else 0
    shares = shares and chosen > 0
    logger.info(
        "LvLLM: LVLLM_GPU_PREFILL_MIN_BATCH_SIZE=auto is %s%s",
        describe(chosen, points, copy, layer.size(), layers),
        f"; shared by the CPU, {rates.describe()}" if shares else "",
    )
    return chosen, rates if shares else None


def _within_time(
    measured: MeasuredThreshold, measure: Callable[[int], Point]
) -> Callable[[int], Point | None]:
    """Let `measure` return None once all its batches, with the next one, may exceed SECONDS."""
    begin, spent, last = time.perf_counter(), 0.0, 0.0

    def limited(tokens: int) -> Point | None:
        nonlocal spent, last
        if spent + 2 * last > SECONDS:  # Twice the tokens take at most twice as long.
            return None
        point = measure(tokens)
        (now,) = measured.agree((time.perf_counter() - begin,))
        spent, last = now, now - spent
        return point

    return limited


def _rates(layer: OffloadedLayer, copy: float, points: Sequence[Point]) -> Rates:
    """Return what an expert of the layer costs, whose tokens were spread over all experts."""
    here, chance = layer.experts.num_experts, layer.topk / layer.routed
    return fit(
        copy / here,
        [(point.tokens * chance * here, point.cpu) for point in points],
        [here * (1 - (1 - chance) ** point.tokens) for point in points],
    )


def describe(chosen: int, points: Sequence[Point], copy: float, size: int, layers: int) -> str:
    """Describe the threshold and the times behind it in one line. `size` is a layer's bytes."""
    beyond = [point for point in points if chosen and point.tokens >= chosen]
    nearest = (min if beyond else max)(beyond or points, key=lambda point: point.tokens)
    # If the CPU is faster, only a lower bound of the streamed time is known.
    at_least = "at least " if nearest.gain <= 0 else ""
    return (
        f"{chosen if chosen else '0 (off)'}: bus {size / copy / 1e9:.1f} GB/s, a layer's"
        f" {size / 1e6:.1f} MB in {1e3 * copy:.2f} ms; {nearest.tokens} tokens take it"
        f" {1e3 * nearest.cpu:.2f} ms on the CPU ({nearest.tokens / nearest.cpu / layers:.0f}"
        f" tokens/s through {layers} layers), {at_least}{1e3 * nearest.streamed:.2f} ms"
        " streamed"
    )


class _LayerTimer:
    """Times one layer on random batches."""

    def __init__(self, dtype: torch.dtype, ring: StagingRing, layer: OffloadedLayer) -> None:
        self._dtype, self._ring, self._layer = dtype, ring, layer
        self._accelerator = layer.accelerator
        # The process's own generator is left alone, so that vLLM samples the same tokens.
        self._random = torch.Generator(self._accelerator.device).manual_seed(0)

    def copy(self) -> float:
        """Return the seconds of the whole layer's copy, with no other copy under way."""
        everyone = [1] * self._layer.experts.num_experts
        stream = self._ring.stream
        return self._best(lambda: list(stream(self._layer.number, everyone)), before=self.drop)

    def cpu(self, *batch: torch.Tensor) -> float:
        """Return the seconds of a batch on the CPU, with the copies there and back."""
        return self._best(lambda: self._layer.call(*batch))

    def streamed(self, *batch: torch.Tensor) -> float:
        """Return the seconds of a batch on the device, of which nothing was copied before."""
        layer = self._layer
        return self._best(
            lambda: streamed.run(layer.experts, self._ring, layer.number, *batch),
            before=self.drop,
        )

    def warm_up(self, tokens: int) -> None:
        """Compute a batch on both paths, without timing it."""
        batch = self.batch(tokens)
        self.cpu(*batch)
        self.streamed(*batch)

    def batch(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return x, ids and weights of a batch. Each token has random experts, some of them other
        ranks'.
        """
        layer, random, device = self._layer, self._random, self._accelerator.device
        shape = (tokens, layer.experts.hidden_size)
        x = torch.randn(shape, generator=random, dtype=self._dtype, device=device)
        shape = (tokens, layer.routed)
        draws = torch.rand(shape, generator=random, dtype=torch.float32, device=device)
        ids = draws.topk(layer.topk).indices.int()
        ids[ids >= layer.experts.num_experts] = -1
        return x, ids, torch.full_like(ids, 1 / layer.topk, dtype=torch.float32)

    def shared(self, rates: Rates, *batch: torch.Tensor) -> float:
        """Return the seconds of a batch on both, of which nothing was copied before."""
        layer = self._layer
        experts, call = layer.experts, layer.call
        return self._best(
            lambda: shared.run(experts, self._ring, layer.number, call, rates, *batch),
            before=self.drop,
        )

    def drop(self) -> None:
        """Leave the ring as it was: nothing is being copied."""
        self._ring.abort()
        self._ring.settle()

    def _best(self, work: Callable[[], object], before: Callable[[], object] = int) -> float:
        """Return the shortest of up to three runs. Other work of the machine only adds time."""
        times: list[float] = []
        while len(times) < 3 and sum(times) < ENOUGH:
            before()
            self._accelerator.synchronize(self._accelerator.compute())
            start = time.perf_counter()
            work()
            self._accelerator.synchronize(self._accelerator.compute())
            times.append(time.perf_counter() - start)
        return min(times)
