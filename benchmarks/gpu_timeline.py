"""Shows when copies and products of a streamed pass run, in characters and as a profiler's trace.

On a GPU, the times come from PyTorch's profiler. On the stand-in, they are those of its threads,
and copies are slowed down to about the time of the products, so only the order says something.
"""

import json
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

from lvllm.engine.expert_layer import ExpertLayer
from lvllm.gpu.accelerator import Accelerator
from lvllm.gpu.products import Pairs, multiply
from lvllm.gpu.ring import StagingRing
from lvllm.gpu.stand_in import StandInAccelerator, StandInStream
from lvllm.units import GIB

__all__ = ["TracedStandIn", "busy", "draw", "of_host", "of_trace", "timeline"]

WIDTH = 96
COPY, COMPUTE = "copy", "compute"

Spans = list[tuple[float, float]]
"""Begin and end of pieces of work in seconds. They may overlap."""


class TracedStandIn(StandInAccelerator):
    """A stand-in that notes when each piece of a copy runs."""

    def __init__(self, delay: Callable[[], float] | None = None) -> None:
        super().__init__(delay)
        self.copies: Spans = []

    def launch(self, work: Callable[[], object], stream: StandInStream) -> None:
        super().launch(partial(self._timed, work), stream)

    def _sleep(self) -> None:
        self._timed(super()._sleep)

    def _timed(self, work: Callable[[], object]) -> None:
        begin = time.perf_counter()
        work()
        self.copies.append((begin, time.perf_counter()))


def _pass(
    accelerator: Accelerator,
    ring: StagingRing,
    layers: list[ExpertLayer],
    inputs: tuple[torch.Tensor, ...],
) -> Spans:
    """Run a pass. Returns when the caller computed, which says nothing on a GPU."""
    spans: Spans = []
    x, ids, weights = inputs
    for number, layer in enumerate(layers):
        pairs = Pairs.sort(ids, weights, layer.num_experts)
        total = torch.zeros_like(x, dtype=torch.float32)
        for some, tensors in ring.stream(number, pairs.counts()):
            begin = time.perf_counter()
            multiply(layer, tensors, some, x, pairs, total)
            spans.append((begin, time.perf_counter()))
    accelerator.synchronize(accelerator.compute())
    return spans


def _ring(accelerator: Accelerator, layers: list[ExpertLayer], ahead: int) -> StagingRing:
    weights = {number: layer.tensors for number, layer in enumerate(layers)}
    return StagingRing(accelerator, weights, ahead, GIB)


def of_host(
    layers: list[ExpertLayer], inputs: tuple[torch.Tensor, ...], ahead: int
) -> dict[str, Spans]:
    """Time a pass on the stand-in."""
    plain = StandInAccelerator()
    groups = _pass(plain, _ring(plain, layers[:1], 0), layers[:1], inputs)
    plain.close()
    products = _total(groups) / len(groups)
    # A copy of a group has four pieces for each tensor, and each of two events is one more.
    pieces = 4 * len(layers[0].tensors) + 2
    accelerator = TracedStandIn(delay=lambda: products / pieces)
    computed = _pass(accelerator, _ring(accelerator, layers, ahead), layers, inputs)
    copied = sorted(accelerator.copies)
    accelerator.close()
    return {COPY: copied, COMPUTE: computed}


def of_trace(trace: Mapping[str, object]) -> dict[str, Spans]:
    """Read the times on the GPU from a trace of PyTorch's profiler."""
    found: dict[str, Spans] = {COPY: [], COMPUTE: []}
    events = trace["traceEvents"]
    assert isinstance(events, list)
    for event in events:
        kind = event.get("cat")
        to_device = kind == "gpu_memcpy" and "HtoD" in event["name"]
        if kind == "kernel" or to_device:
            begin = 1e-6 * float(event["ts"])
            span = begin, begin + 1e-6 * float(event["dur"])
            found[COPY if to_device else COMPUTE].append(span)
    return {name: sorted(spans) for name, spans in found.items()}


def timeline(
    accelerator: Accelerator,
    layers: list[ExpertLayer],
    inputs: tuple[torch.Tensor, ...],
    ahead: int,
    trace: Path,
) -> dict[str, Spans]:
    """Time a second pass on the GPU. The trace file can be read by chrome://tracing."""
    from torch.profiler import ProfilerActivity, profile

    ring = _ring(accelerator, layers, ahead)
    _pass(accelerator, ring, layers, inputs)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        _pass(accelerator, ring, layers, inputs)
    profiler.export_chrome_trace(str(trace))
    return of_trace(json.loads(trace.read_text()))


def busy(spans: Spans) -> Spans:
    """Return the same times in order, without overlap."""
    joined: Spans = []
    for begin, end in sorted(spans):
        if joined and begin <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((begin, end))
    return joined


def _total(spans: Spans) -> float:
    return sum(end - begin for begin, end in spans)


def _within(spans: Spans, begin: float, end: float) -> Spans:
    return [(max(b, begin), min(e, end)) for b, e in spans if b < end and begin < e]


def draw(times: dict[str, Spans]) -> str:
    """Draw a line of characters for each, and say how much of the shorter the longer hides."""
    joined = {name: busy(spans) for name, spans in times.items()}
    ends = [span for spans in joined.values() for span in spans]
    if not all(joined.values()):
        return "nothing was seen of " + " and ".join(n for n, spans in joined.items() if not spans)
    first, last = min(ends)[0], max(end for _, end in ends)
    step = (last - first) / WIDTH
    lines = []
    for name, spans in joined.items():
        shares = [
            _total(_within(spans, first + i * step, first + (i + 1) * step)) / step
            for i in range(WIDTH)
        ]
        bar = "".join("#" if share > 0.5 else "-" if share > 0.05 else " " for share in shares)
        lines.append(f"{name:>8} |{bar}| {1e3 * _total(spans):.4g} ms")
    both = sum(_total(_within(joined[COPY], *span)) for span in joined[COMPUTE])
    shorter = min(_total(spans) for spans in joined.values())
    lines.append(
        f"{1e3 * (last - first):.4g} ms in all, {1e3 * both:.4g} ms side by side:"
        f" {both / shorter:.0%} of the shorter"
    )
    return "\n".join(lines)
