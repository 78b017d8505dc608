"""Ends the process when something that the GPU waits for does not happen, and says what it was.

The watchdog's thread reads host memory and never calls CUDA. A query of an event may block behind a
thread that waits for the device, and would break a graph that is being captured. So the device
itself writes to host memory how far a stream has come. The thread sleeps until the oldest step that
is due would be late, or until a step becomes due.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from threading import Condition, Thread, current_thread

import torch

from lvllm.gpu.accelerator import Accelerator, Stream

__all__ = ["Steps", "StreamSteps", "Watchdog"]

NUMBERS = 1 << 16
"""The marks of a stream are numbered modulo this. CUDA queues some thousand of them at most."""

Name = str | Callable[[], str]
"""A step's name, or a function that tells the name once the step is late. The replay of a graph has
many steps, of which only the late one is of interest."""


@dataclass(frozen=True)
class _Step:
    name: Name
    happened: Callable[[], bool]
    late: float
    """The step is late from this time.monotonic() on."""


class Watchdog:
    """Ends the process when a step has not happened `seconds` after it was due.

    Args:
        accelerator: the device whose streams are watched.
        seconds: the time that a step may take.
        end: ends the process. It is called in the watchdog's thread, with one line that names the
            step.
    """

    def __init__(
        self, accelerator: Accelerator, seconds: float, end: Callable[[str], object]
    ) -> None:
        self.accelerator = accelerator
        self.numbers = torch.arange(NUMBERS, dtype=torch.int32, device=accelerator.device)
        # Other streams read the numbers, so they have to be there from now on.
        accelerator.synchronize(accelerator.compute())
        self._seconds = seconds
        self._end = end
        self._changed = Condition()  # This guards all of the following, and what Steps hold.
        self._all: list[Steps] = []
        self._sleeps_for_good = False
        self._closed = False
        self._thread = Thread(target=self._watch, name="lvllm-watchdog", daemon=True)
        self._thread.start()

    def steps(self) -> "Steps":
        """Return a new sequence of steps."""
        with self._changed:
            self._all.append(Steps(self))
            return self._all[-1]

    def follow(self, stream: Stream) -> "StreamSteps":
        """Return a new sequence of steps in `stream`."""
        with self._changed:
            steps = StreamSteps(self, stream)
            self._all.append(steps)
            return steps

    def close(self) -> None:
        """Stop watching.

        A finaliser may call this in any thread, also in the watchdog's own.
        """
        with self._changed:
            self._closed = True
            self._changed.notify()
        if current_thread() is not self._thread:
            self._thread.join()

    def _due(self, steps: "Steps", name: Name, happened: Callable[[], bool]) -> None:
        with self._changed:
            steps.clear()
            steps.waiting.append(_Step(name, happened, time.monotonic() + self._seconds))
            if self._sleeps_for_good:  # From any other sleep it wakes in time for this step.
                self._changed.notify()

    def _watch(self) -> None:
        with self._changed:
            step = self._next_late_step()
        if step is None:
            return
        name = step.name if isinstance(step.name, str) else step.name()
        self._end(
            f"{name} has not happened for {self._seconds:g} s (LVLLM_WATCHDOG_SECONDS): the"
            " process ends"
        )

    def _next_late_step(self) -> _Step | None:
        """Sleep until a step is late. Return the oldest one, or None once this is closed."""
        while True:
            for steps in self._all:
                steps.clear()
            if self._closed:  # This is checked last, as a finaliser may run in this thread.
                return None
            oldest = min(
                (steps.waiting[0] for steps in self._all if steps.waiting),
                key=lambda step: step.late,
                default=None,
            )
            if oldest is None:
                self._sleeps_for_good = True
                self._changed.wait()
                self._sleeps_for_good = False
            elif (left := oldest.late - time.monotonic()) > 0:
                self._changed.wait(left)
            else:
                return oldest


class Steps:
    """A sequence of steps that happen in the order in which they become due."""

    def __init__(self, watchdog: Watchdog) -> None:
        self._watchdog = watchdog
        self.waiting: deque[_Step] = deque()

    def due(self, name: Name, happened: Callable[[], bool]) -> None:
        """Make a step due. Its name is, for example, "layer 3: experts on the CPU".

        `happened` tells whether the step has happened. It is called in any thread, and only reads
        host memory.
        """
        self._watchdog._due(self, name, happened)

    def clear(self) -> None:
        """Forget steps that have happened. The caller holds the watchdog's lock."""
        while self.waiting and self.waiting[0].happened():
            self.waiting.popleft()


class StreamSteps(Steps):
    """A sequence of steps. Each one is all work that a stream holds when the step is marked."""

    def __init__(self, watchdog: Watchdog, stream: Stream) -> None:
        super().__init__(watchdog)
        self._stream = stream
        self._marked = 0
        self._reached = watchdog.accelerator.pinned((1,), torch.int32).zero_()

    def mark(self, name: Name) -> None:
        """Make a step due that has happened once the stream has done all work that it holds now.

        The device copies four bytes for it. This must not be called while a graph is captured.
        """
        self._marked = (self._marked + 1) % NUMBERS
        number = self._watchdog.numbers[self._marked : self._marked + 1]
        self._watchdog.accelerator.copy(self._reached, number, self._stream)
        self.due(name, partial(self._passed, self._marked))

    def _passed(self, mark: int) -> bool:
        return (int(self._reached.item()) - mark) % NUMBERS < NUMBERS // 2
