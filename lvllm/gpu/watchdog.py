"""Ends the process where something on the GPU's way does not happen, and says what.

The watchdog's thread looks at host memory alone and calls nothing of CUDA: a query of an event may
block behind a thread that waits for the device, and would break a graph that is being captured.
What a stream has done, the device itself writes to host memory. The thread sleeps until the oldest
step that is due would be late, and for good when none is.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from threading import Condition, Thread

import torch

from lvllm.faults import process
from lvllm.gpu.accelerator import Accelerator, Stream

__all__ = ["Steps", "StreamSteps", "Watchdog"]

NUMBERS = 1 << 16
"""Marks of a stream are numbered modulo this; some thousand are the most that CUDA queues."""

Name = str | Callable[[], str]
"""Of a step, or what tells it once the step is late: a graph's replay has many."""


@dataclass(frozen=True)
class _Step:
    name: Name
    happened: Callable[[], bool]
    late: float
    """time.monotonic() of when it should have happened."""


class Watchdog:
    """Ends the process when a step has not happened `seconds` after it was due.

    `end` is called in the watchdog's thread with one line that names the step.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        seconds: float,
        end: Callable[[str], object] = process.end_now,
    ) -> None:
        self.accelerator = accelerator
        self.numbers = torch.arange(NUMBERS, dtype=torch.int32, device=accelerator.device)
        accelerator.synchronize(accelerator.compute())  # other streams read them
        self._seconds = seconds
        self._end = end
        self._changed = Condition()  # for all of the following, and for what Steps hold
        self._all: list[Steps] = []
        self._sleeps_for_good = False
        self._closed = False
        self._thread = Thread(target=self._watch, name="lvllm-watchdog", daemon=True)
        self._thread.start()

    def steps(self) -> "Steps":
        """A new sequence of steps."""
        with self._changed:
            self._all.append(Steps(self))
            return self._all[-1]

    def follow(self, stream: Stream) -> "StreamSteps":
        """A new sequence of steps in `stream`."""
        with self._changed:
            steps = StreamSteps(self, stream)
            self._all.append(steps)
            return steps

    def close(self) -> None:
        """Watch no more."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _due(self, steps: "Steps", name: Name, happened: Callable[[], bool]) -> None:
        with self._changed:
            steps.clear()
            steps.waiting.append(_Step(name, happened, time.monotonic() + self._seconds))
            if self._sleeps_for_good:  # from any other sleep it wakes in time for this one
                self._changed.notify()

    def _watch(self) -> None:
        with self._changed:
            while not self._closed:
                for steps in self._all:
                    steps.clear()
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
                    break
            else:
                return
        name = oldest.name if isinstance(oldest.name, str) else oldest.name()
        self._end(
            f"{name} has not happened for {self._seconds:g} s (LVLLM_WATCHDOG_SECONDS): the"
            " process ends"
        )


class Steps:
    """Steps that happen in the order in which they become due."""

    def __init__(self, watchdog: Watchdog) -> None:
        self._watchdog = watchdog
        self.waiting: deque[_Step] = deque()

    def due(self, name: Name, happened: Callable[[], bool]) -> None:
        """`name`, say "layer 3: experts on the CPU", is due from now on.

        `happened` says whether it has happened, in any thread, by a look at host memory.
        """
        self._watchdog._due(self, name, happened)

    def clear(self) -> None:
        """Forget what has happened. The watchdog's lock is held."""
        while self.waiting and self.waiting[0].happened():
            self.waiting.popleft()


class StreamSteps(Steps):
    """Steps in a stream, which end where it is by now."""

    def __init__(self, watchdog: Watchdog, stream: Stream) -> None:
        super().__init__(watchdog)
        self._stream = stream
        self._marked = 0
        self._reached = watchdog.accelerator.pinned((1,), torch.int32).zero_()

    def mark(self, name: Name) -> None:
        """`name` is due, and has happened once the stream comes here. Not while capturing.

        Takes the device a copy of four bytes.
        """
        self._marked = (self._marked + 1) % NUMBERS
        number = self._watchdog.numbers[self._marked : self._marked + 1]
        self._watchdog.accelerator.copy(self._reached, number, self._stream)
        self.due(name, partial(self._passed, self._marked))

    def _passed(self, mark: int) -> bool:
        return (int(self._reached.item()) - mark) % NUMBERS < NUMBERS // 2
