"""A stand-in for a GPU on the host, for tests. Its streams are threads, so a missing wait shows."""

import ctypes
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from threading import Condition, Thread

import torch

from lvllm.gpu.accelerator import Accelerator, check_copy, check_pinnable
from lvllm.gpu.pinning import PinnedTensors
from lvllm.units import ceil_div

__all__ = ["StandInAccelerator", "StandInEvent", "StandInMark", "StandInStream"]

PIECES = 4
"""A copy is done in this many parts: who reads too early sees a mixture of old and new bytes."""
WORD = 8
"""The size of a part is a multiple of this many bytes, which arrive together, as over a bus."""

_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Point:
    """A place in a stream."""

    passed = False


class StandInEvent:
    """An event. It has the point in a stream where it was recorded last."""

    point: _Point | None = None


class StandInMark:
    """A place in a stream, and the time.perf_counter() at which it was reached."""

    reached: float | None = None


class StandInStream:
    """A queue of work. The caller's own stream is always empty."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.work: deque[Callable[[], None]] = deque()


class StandInAccelerator(Accelerator):
    """An accelerator whose streams are threads. In the caller's own stream, work is done at once,
    and waiting blocks the caller.

    Args:
        delay: returns the seconds that a thread sleeps before each piece of its work. None means
            that threads do not sleep.

    An error in a thread is raised as a RuntimeError by the caller's next `record`, `wait` or
    `synchronize`, and by all later ones, as an error of a CUDA device is. No work is done after
    that, but nothing hangs, since events are still reached.
    """

    name = "host"
    device = torch.device("cpu")
    compiles = False

    def __init__(self, delay: Callable[[], float] | None = None) -> None:
        self._delay = delay
        self._caller = StandInStream("caller")
        # Pinning does nothing here, except that it refuses what CUDA would refuse.
        self._registered: dict[int, int] = {}
        self._pinned = PinnedTensors(self._register, self._registered.pop, lambda: None)
        self._threads: list[Thread] = []
        # This guards all of the following, and the streams' queues and points.
        self._changed = Condition()
        self._error: BaseException | None = None
        self._closed = False

    def compute(self) -> StandInStream:
        return self._caller

    def stream(self) -> StandInStream:
        stream = StandInStream(f"lvllm-stream-{len(self._threads)}")
        thread = Thread(target=self._serve, args=(stream,), name=stream.name, daemon=True)
        self._threads.append(thread)
        thread.start()
        return stream

    def within(self, stream: StandInStream) -> AbstractContextManager[object]:
        # PyTorch works in the caller's thread, so the stream's earlier work has to be done by then.
        self.synchronize(stream)
        return nullcontext()

    def event(self) -> StandInEvent:
        return StandInEvent()

    def record(self, event: StandInEvent, stream: StandInStream) -> None:
        self._raise()
        event.point = _Point()
        self._put(partial(self._pass, event.point), stream)

    def wait(self, event: StandInEvent, stream: StandInStream) -> None:
        self._raise()
        if event.point is not None:
            # This takes the point of now, since later records of the event are not waited for.
            self._put(partial(self._await, event.point), stream)
            self._raise()
            if self._closed:
                raise RuntimeError("the host stand-in is closed")

    def reached(self, event: StandInEvent) -> bool:
        with self._changed:
            return event.point is None or event.point.passed

    def mark(self, stream: StandInStream) -> StandInMark:
        self._raise()
        mark = StandInMark()
        self._put(partial(_stamp, mark), stream)
        return mark

    def seconds(self, first: StandInMark, second: StandInMark) -> float | None:
        if first.reached is None or second.reached is None:
            return None
        return second.reached - first.reached

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: StandInStream) -> None:
        check_copy(target, source)
        step = WORD * max(1, ceil_div(source.nbytes, PIECES * WORD))
        for begin in range(0, source.nbytes, step):
            size = min(step, source.nbytes - begin)
            self.launch(partial(_copy_bytes, target, source, begin, size), stream)

    def call(self, function: int, argument: int, stream: StandInStream) -> None:
        self.launch(partial(_FUNCTION(function), argument), stream)

    def write_word(self, address: int, value: int, stream: StandInStream) -> None:
        self.launch(partial(_store, address, value), stream)

    def await_word(self, address: int, value: int, stream: StandInStream) -> None:
        self.launch(partial(self._await_word, address, value), stream)

    def exchange(
        self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], stream: StandInStream
    ) -> None:
        for target, source in pairs:
            self.copy(target, source, stream)

    def launch(self, work: Callable[[], object], stream: StandInStream) -> None:
        """Call a Python function in stream order. It takes the place of a kernel."""
        if stream is self._caller:
            work()
        else:
            self._put(partial(self._attempt, work), stream)

    def synchronize(self, stream: StandInStream) -> None:
        event = self.event()
        self.record(event, stream)
        self.wait(event, self._caller)

    def device_memory(self, size: int, stream: StandInStream) -> torch.Tensor:
        try:
            return torch.empty(size, dtype=torch.uint8)
        except RuntimeError:
            raise MemoryError(f"the host has no {size} bytes") from None

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype)

    def pin(self, tensor: torch.Tensor) -> None:
        check_pinnable(tensor)
        self._pinned.pin(tensor)

    def unpin(self, tensor: torch.Tensor) -> None:
        self._pinned.unpin(tensor)

    def capturing(self) -> bool:
        return False

    def close(self) -> None:
        """End the threads. Work that they have not begun is dropped, and nobody waits any more.

        Raises RuntimeError if a thread does work that does not end.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(timeout=10)
            if thread.is_alive():
                raise RuntimeError(f"{thread.name} does not end")

    def _register(self, address: int, size: int) -> None:
        for begin, other in self._registered.items():
            if begin < address + size and address < begin + other:
                raise RuntimeError(f"pages at {address:#x} are registered already")
        self._registered[address] = size

    def _put(self, work: Callable[[], None], stream: StandInStream) -> None:
        if stream is self._caller:
            work()
            return
        with self._changed:
            if self._closed:
                raise RuntimeError("the host stand-in is closed")
            stream.work.append(work)
            self._changed.notify_all()

    def _serve(self, stream: StandInStream) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: stream.work or self._closed)
                if self._closed:
                    return
                work = stream.work.popleft()
            self._attempt(self._sleep)
            work()

    def _sleep(self) -> None:
        if self._delay is not None:
            time.sleep(self._delay())

    def _attempt(self, work: Callable[[], object]) -> None:
        """Do a piece of work in a stream's thread, unless something has failed."""
        if self._error is not None:
            return
        try:
            work()
        except BaseException as error:
            with self._changed:
                self._error = self._error or error

    def _pass(self, point: _Point) -> None:
        with self._changed:
            point.passed = True
            self._changed.notify_all()

    def _await(self, point: _Point) -> None:
        with self._changed:
            self._changed.wait_for(lambda: point.passed or self._closed)

    def _await_word(self, address: int, value: int) -> None:
        word = ctypes.c_uint64.from_address(address)
        while word.value != value and not self._closed:
            time.sleep(0)  # Python's other threads get their turns.

    def _raise(self) -> None:
        if self._error is not None:
            raise RuntimeError(f"in a stream of the host stand-in: {self._error}") from self._error


def _stamp(mark: StandInMark) -> None:
    mark.reached = time.perf_counter()


def _store(address: int, value: int) -> None:
    ctypes.c_uint64.from_address(address).value = value


def _copy_bytes(target: torch.Tensor, source: torch.Tensor, begin: int, size: int) -> None:
    # Tensor.copy_ would start threads of OpenMP in each of our threads.
    ctypes.memmove(target.data_ptr() + begin, source.data_ptr() + begin, size)
