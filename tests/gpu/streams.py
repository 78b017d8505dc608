"""Stand-ins for tests of the waits between streams."""

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from lvllm.gpu.stand_in import StandInAccelerator, StandInEvent, StandInStream


class Recorded(StandInAccelerator):
    """A stand-in that notes which host tensors are copied, and how much memory is allocated."""

    def __init__(self, delay: Callable[[], float] | None = None) -> None:
        super().__init__(delay)
        self.sources: list[torch.Tensor] = []
        self.allocated = 0

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: StandInStream) -> None:
        self.sources.append(source)
        super().copy(target, source, stream)

    def device_memory(self, size: int, stream: StandInStream) -> torch.Tensor:
        self.allocated += size
        return super().device_memory(size, stream).fill_(0xEE)


class RecordedAhead(Recorded):
    """A stand-in whose caller runs ahead, as on a GPU: a thread does the caller's computations."""

    def __init__(self, delay: Callable[[], float] | None = None) -> None:
        super().__init__(delay)
        self._computing = self.stream()

    def compute(self) -> StandInStream:
        return self._computing


def uneven(seed: int, longest: tuple[float, float]) -> Callable[[], float]:
    """Make random delays. `longest` is in seconds, for the first stream and for all others."""
    draw = random.Random(seed)

    def delay() -> float:
        most = longest[not threading.current_thread().name.endswith("-0")]
        return draw.random() * most if most and draw.random() < 0.5 else 0.0

    return delay


class Queueing(StandInAccelerator):
    """A stand-in whose caller's tensor operations are queued, as those on a GPU are.

    Within `queued()`, they are done by the thread of the stream that the caller works in, whatever
    is still before them there. `missing` is the wait that is left out, counted from 0.
    """

    missing: int | None = None
    waits = 0

    def __init__(self, delay: Callable[[], float] | None = None) -> None:
        super().__init__(delay)
        self._current = self.stream()

    def compute(self) -> StandInStream:
        return self._current

    @contextmanager
    def within(self, stream: StandInStream) -> Iterator[None]:
        outside, self._current = self._current, stream
        try:
            yield
        finally:
            self._current = outside

    def wait(self, event: StandInEvent, stream: StandInStream) -> None:
        self.waits += 1
        if self.waits - 1 != self.missing:
            super().wait(event, stream)

    def queued(self) -> AbstractContextManager[object]:
        return _Queue(self)


class _Queue(TorchDispatchMode):
    """Puts each tensor operation in the stream that the caller works in."""

    def __init__(self, accelerator: Queueing) -> None:
        super().__init__()
        self._accelerator = accelerator

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # Otherwise torch.compile would be imported, which takes 5 s.

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        reads = any(isinstance(one, torch.Tensor) for one in tree_leaves((args, kwargs)))
        if not reads or func.is_view:
            return func(*args, **kwargs)  # This only makes memory, or a view of it.
        stream = self._accelerator.compute()
        if func._schema.is_mutable:
            self._accelerator.launch(partial(func, *args, **kwargs), stream)
            return args[0]
        # Computed from whatever is there now, to learn what is returned.
        results = tree_map_only(torch.Tensor, torch.zeros_like, func(*args, **kwargs))

        def compute() -> None:
            done = tree_leaves(func(*args, **kwargs))
            for place, one in zip(tree_leaves(results), done, strict=True):
                place.copy_(one)

        self._accelerator.launch(compute, stream)
        return results
