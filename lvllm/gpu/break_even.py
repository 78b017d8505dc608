"""From which batch on it is faster to copy a layer to the device than to compute it with lk: what
LVLLM_GPU_PREFILL_MIN_BATCH_SIZE=auto chooses, by measuring one layer at start.

On the CPU a layer costs lk's time and the way of the tokens there and back. Streamed it costs, in a
pass over many layers, the longer of its copy and its products; without a window their sum, for then
no copy is under way beside products. What both ways have in common is left out.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, isqrt
from typing import TYPE_CHECKING

import torch

from lvllm.gpu import streamed
from lvllm.gpu.window import PrefetchWindow

if TYPE_CHECKING:
    from lvllm.gpu.offload import OffloadedLayer

__all__ = ["MeasuredThreshold", "Point", "choose", "search", "streamed_seconds", "threshold"]

# As vLLM names the loggers that it shows, but this package works without it.
logger = logging.getLogger("vllm.plugins.lvllm")

SECONDS = 2.0
"""That batches may take, of a start that takes minutes."""
ENOUGH = 0.05
"""Seconds after which one part is not tried again; shorter ones are tried three times."""
WARM_UP = 256
"""Tokens of a first batch that does not count: kernels are loaded, and Triton's compiled."""
PRECISION = 8
"""An interval around the break-even is halved until it is an eighth of its end: what a layer takes
differs by more between one batch's choice of experts and another's."""


@dataclass(frozen=True)
class MeasuredThreshold:
    """That the threshold is to be measured.

    `dtype` is that of activations. `agree` returns the largest of each number among the ranks that
    hold parts of the same layers, which call it together. A step takes as long as its slowest
    rank, so what is slowest decides; and all of them measure the same batches and choose the same.
    (Were a rank to choose another way, its part of the sum would be as right, rounded otherwise.
    Stages of a pipeline have layers of their own, and may differ.) The threshold is not below
    `least`.
    """

    dtype: torch.dtype
    agree: Callable[[Sequence[float]], Sequence[float]] = tuple
    least: int = 1


@dataclass(frozen=True)
class Point:
    """What a layer takes for a batch, in seconds: on the CPU, and streamed."""

    tokens: int
    cpu: float
    streamed: float

    @property
    def gain(self) -> float:
        """Seconds that streaming saves."""
        return self.cpu - self.streamed


def streamed_seconds(copy: float, products: float, ahead: int) -> float:
    """Of a layer amid others, with so many copied ahead."""
    return max(copy, products) if ahead else copy + products


def search(measure: Callable[[int], Point | None], most: int) -> list[Point]:
    """Points on both sides of the break-even, of batches from 1 to `most` tokens.

    Sizes double until streaming is faster twice in a row, for once may be chance, and then halve
    the interval. Ends early when `measure` returns None: there is no time left.
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
    """The smallest batch from which on streaming is not slower; 0 if there is none up to `most`.

    Between two points, and beyond the last where time ran out, lines are straight.
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
    """The largest batch that is not faster streamed, and all larger ones, in order."""
    ordered = sorted(points, key=lambda point: point.tokens)
    slower = [place for place, point in enumerate(ordered) if point.gain <= 0]
    if not slower:
        return None, ordered
    return ordered[slower[-1]], ordered[slower[-1] + 1 :]


def choose(
    auto: MeasuredThreshold, window: PrefetchWindow, layer: OffloadedLayer, layers: int, most: int
) -> int:
    """Measure a `layer` of `layers` in batches of up to `most` tokens -> the threshold; 0: none.

    Logs one line. All ranks measure at the same time, as they compute: they share the host's
    memory, and some a bus.
    """
    bench = _Bench(auto.dtype, window, layer)
    bench.warm_up(min(most, WARM_UP))
    auto.agree((0.0,))  # the ranks begin together
    (copy,) = auto.agree((bench.copy(),))
    begin, spent, last = time.perf_counter(), 0.0, 0.0
    known: list[Point] = []

    def measure(tokens: int) -> Point | None:
        nonlocal spent, last
        if spent + 2 * last > SECONDS:  # twice the tokens take twice as long at most
            return None
        batch = bench.batch(tokens)
        cpu, now = auto.agree((bench.cpu(*batch), time.perf_counter() - begin))
        # More tokens take no less. Where the CPU is below that, the device need not be tried.
        least = max((one.streamed for one in known if one.tokens < tokens), default=copy)
        if cpu > least:
            products, now = auto.agree((bench.products(*batch), time.perf_counter() - begin))
            least = streamed_seconds(copy, products, window.ahead)
        spent, last = now, now - spent
        known.append(Point(tokens, cpu, least))
        return known[-1]

    points = search(measure, most)
    bench.drop()
    chosen = threshold(points, most)
    if 0 < chosen < auto.least:
        chosen = auto.least if auto.least <= most else 0
    logger.info(
        "LvLLM: LVLLM_GPU_PREFILL_MIN_BATCH_SIZE=auto is %s",
        describe(chosen, points, copy, layer.size(), layers, window.ahead),
    )
    return chosen


def describe(
    chosen: int, points: Sequence[Point], copy: float, size: int, layers: int, ahead: int
) -> str:
    """The threshold and what it follows from, in one line. `size` is a layer's in bytes."""
    beyond = [point for point in points if chosen and point.tokens >= chosen]
    nearest = (min if beyond else max)(beyond or points, key=lambda point: point.tokens)
    # Where the CPU is faster, it is only known how long a batch takes streamed at least.
    at_least = "at least " if nearest.gain <= 0 else ""
    unhidden = "" if ahead else ", for LVLLM_GPU_PREFETCH_WINDOW=0 hides no copy"
    return (
        f"{chosen if chosen else '0 (off)'}: bus {size / copy / 1e9:.1f} GB/s, a layer's"
        f" {size / 1e6:.1f} MB in {1e3 * copy:.2f} ms; {nearest.tokens} tokens take it"
        f" {1e3 * nearest.cpu:.2f} ms on the CPU ({nearest.tokens / nearest.cpu / layers:.0f}"
        f" tokens/s through {layers} layers), {at_least}{1e3 * nearest.streamed:.2f} ms"
        f" streamed{unhidden}"
    )


class _Bench:
    """One layer, staged, and timed on random batches."""

    def __init__(self, dtype: torch.dtype, window: PrefetchWindow, layer: OffloadedLayer) -> None:
        self._dtype, self._window, self._layer = dtype, window, layer
        self._accelerator = layer.offload.accelerator
        # Not the process's own generator: what vLLM samples does not depend on this.
        self._random = torch.Generator(self._accelerator.device).manual_seed(0)
        self._stage()
        window.settle()

    def copy(self) -> float:
        """Seconds of the layer's copy, with no other under way. The layer is staged again."""
        seconds = self._best(self._stage, before=self.drop)
        self._window.settle()
        return seconds

    def cpu(self, *batch: torch.Tensor) -> float:
        """Seconds of a batch on the CPU, with the way there and back."""
        return self._best(lambda: self._layer.call(*batch))

    def products(self, *batch: torch.Tensor) -> float:
        """Seconds of a batch's products on the device."""
        return self._best(lambda: streamed.run(self._layer.experts, self._staged, *batch))

    def warm_up(self, tokens: int) -> None:
        batch = self.batch(tokens)
        self.cpu(*batch)
        self.products(*batch)

    def batch(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x, ids and weights: each token takes experts at random, some of them other ranks'."""
        layer, random, device = self._layer, self._random, self._accelerator.device
        shape = (tokens, layer.experts.hidden_size)
        x = torch.randn(shape, generator=random, dtype=self._dtype, device=device)
        shape = (tokens, layer.routed)
        draws = torch.rand(shape, generator=random, dtype=torch.float32, device=device)
        ids = draws.topk(layer.topk).indices.int()
        ids[ids >= layer.experts.num_experts] = -1
        return x, ids, torch.full_like(ids, 1 / layer.topk, dtype=torch.float32)

    def drop(self) -> None:
        """Leave the window as it was found: nothing is staged or under way."""
        self._window.abort()
        self._window.settle()

    def _stage(self) -> None:
        self._staged = self._window.stage(self._layer.number)

    def _best(self, work: Callable[[], object], before: Callable[[], object] = int) -> float:
        """The shortest of up to three runs: what else the machine does only ever adds."""
        times: list[float] = []
        while len(times) < 3 and sum(times) < ENOUGH:
            before()
            self._accelerator.synchronize(self._accelerator.compute())
            start = time.perf_counter()
            work()
            self._accelerator.synchronize(self._accelerator.compute())
            times.append(time.perf_counter() - start)
        return min(times)
