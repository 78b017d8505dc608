"""Ends the process when something that the GPU waits for does not happen, and says what it was.

CUDA queues the steps of all layers within milliseconds, and they are due from then on. So a step is
late when nothing at all has happened for the allowed time: a pass may take many times as long. What
waits for another process is never late, and holds back all that became due after it: that process
has a watchdog of its own.

The watchdog's thread reads host memory and never calls CUDA. A query of an event may block behind a
thread that waits for the device, and would break a graph that is being captured. So the device
itself writes to host memory how far a stream has come. The thread looks there a few times in the
allowed time, and sleeps while nothing is due.
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

LOOKS = 8
"""How often the thread looks in the allowed time, while something is due."""

Name = str | Callable[[], str]
"""A step's name, or a function that tells the name once the step is late. The replay of a graph has
many steps, of which only the late one is of interest."""


@dataclass(frozen=True)
class _Step:
    name: Name
    happened: Callable[[], bool]
    due: float
    """The time.monotonic() at which it became due."""
    others: bool = False
    """Whether it waits for other processes, which may take any time."""


class Watchdog:
    """Ends the process when a step is due and nothing has happened for `seconds`.

    Args:
        accelerator: the device whose streams are watched.
        seconds: the time that a step may take.
        end: ends the process. It is called in the watchdog's thread, with one line that names the
            step.
        others: returns what changes whenever other work of the process goes on, such as the calls
            of the engine that a graph makes. It only reads host memory.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        seconds: float,
        end: Callable[[str], object],
        others: Callable[[], object] = lambda: None,
    ) -> None:
        self.accelerator = accelerator
        self.numbers = torch.arange(NUMBERS, dtype=torch.int32, device=accelerator.device)
        # Other streams read the numbers, so they have to be there from now on.
        accelerator.synchronize(accelerator.compute())
        self._seconds = seconds
        self._end = end
        self._others = others
        self._changed = Condition()  # This guards all of the following, and what Steps hold.
        self._all: list[Steps] = []
        self._sleeps_for_good = False
        self._closed = False
        self._happened = time.monotonic()  # when something was last seen to have happened
        self._seen = others()
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

    def _due(
        self, steps: "Steps", name: Name, happened: Callable[[], bool], others: bool = False
    ) -> None:
        with self._changed:
            now = time.monotonic()
            if steps.clear():
                self._happened = now
            steps.waiting.append(_Step(name, happened, now, others))
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
            now = time.monotonic()
            cleared = [steps.clear() for steps in self._all]
            before, self._seen = self._seen, self._others()
            if any(cleared) or self._seen != before:
                self._happened = now
            if self._closed:  # This is checked last, as a finaliser may run in this thread.
                return None
            oldest = min(
                (steps.waiting[0] for steps in self._all if steps.waiting),
                key=lambda step: step.due,
                default=None,
            )
            if oldest is None:
                self._sleeps_for_good = True
                self._changed.wait()
                self._sleeps_for_good = False
            elif oldest.others:
                self._changed.wait(self._seconds / LOOKS)
            elif (left := max(oldest.due, self._happened) + self._seconds - now) > 0:
                self._changed.wait(min(left, self._seconds / LOOKS))
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

    def clear(self) -> bool:
        """Forget steps that have happened, and tell whether there were any.

        The caller holds the watchdog's lock.
        """
        before = len(self.waiting)
        while self.waiting and self.waiting[0].happened():
            self.waiting.popleft()
        return len(self.waiting) < before


class StreamSteps(Steps):
    """A sequence of steps. Each one is all work that a stream holds when the step is marked."""

    def __init__(self, watchdog: Watchdog, stream: Stream) -> None:
        super().__init__(watchdog)
        self._stream = stream
        self._marked = 0
        # The first mark may come within a step, and later ones come between steps. PyTorch does not
        # let these write to a tensor that was made in inference mode.
        with torch.inference_mode(False):
            self._reached = watchdog.accelerator.pinned((1,), torch.int32).zero_()

    def mark(self, name: Name) -> None:
        """Make a step due that has happened once the stream has done all work that it holds now.

        The device copies four bytes for it. This must not be called while a graph is captured.
        """
        self._mark(name, False)

    def mark_others(self) -> None:
        """Say that the stream waits for other processes before it goes on to its next work."""
        self._mark("what other processes send", True)

    def _mark(self, name: Name, others: bool) -> None:
        self._marked = (self._marked + 1) % NUMBERS
        number = self._watchdog.numbers[self._marked : self._marked + 1]
        self._watchdog.accelerator.copy(self._reached, number, self._stream)
        self._watchdog._due(self, name, partial(self._passed, self._marked), others)

    def _passed(self, mark: int) -> bool:
        return (int(self._reached.item()) - mark) % NUMBERS < NUMBERS // 2
