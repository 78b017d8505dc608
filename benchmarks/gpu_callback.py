"""Times what a call of the host costs a stream: CUDA's host functions against a mailbox.

The call does nothing: its batch is empty. Events time it, in a stream and in a graph.
"""

from collections.abc import Callable

import torch

from lvllm.engine.counters import Reason
from lvllm.engine.ops import raw_ops
from lvllm.gpu.accelerator import Accelerator
from lvllm.gpu.calls import through_function, through_mailbox
from tests.random_layers import Random, random_layer

__all__ = ["costs"]

CALLS = 1000
IN_GRAPH = 100


def _microseconds(work: Callable[[], object], calls: int) -> float:
    """Time the calls that `work` puts in the current stream by events, in a second run."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    work()
    torch.cuda.synchronize()
    begin.record()
    work()
    end.record()
    end.synchronize()
    return 1e3 * begin.elapsed_time(end) / calls


def _both(call: Callable[[], object]) -> tuple[float, float]:
    """Return the microseconds of a call in a stream and in a graph."""

    def several(count: int) -> None:
        for _ in range(count):
            call()

    in_stream = _microseconds(lambda: several(CALLS), CALLS)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        several(IN_GRAPH)

    def replays() -> None:
        for _ in range(CALLS // IN_GRAPH):
            graph.replay()

    return in_stream, _microseconds(replays, CALLS)


def costs(accelerator: Accelerator) -> list[tuple[object, ...]]:
    """Return for both: the name, and a call's microseconds in a stream and in a graph.

    If the driver has no mailboxes, the error takes the place of the mailbox's times.
    """
    layer = random_layer(Random(1), "bf16", 2, 64, 64).make()
    x, ids = torch.empty(0, 64, dtype=torch.bfloat16), torch.empty(0, 2, dtype=torch.int32)
    argument = raw_ops.host_call_create()
    batch = (x, ids, torch.empty(0, 2), torch.empty_like(x))
    raw_ops.host_call_fill(argument, int(layer.handle), *batch, 0, Reason.OFF)
    rows: list[tuple[object, ...]] = []
    for name, through in (("host function", through_function), ("mailbox", through_mailbox)):
        try:
            call = through(accelerator)
            rows.append((name, *_both(lambda: call(argument, accelerator.compute()))))  # noqa: B023
        except RuntimeError as error:
            rows.append((name, f"not here: {error}"))
    return rows
