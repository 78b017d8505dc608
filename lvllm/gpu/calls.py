"""How a stream calls lk: through a function of the host, or through a mailbox.

CUDA calls a function of the host from a thread of the driver, which has to wake up first. A mailbox
is a word of pinned memory: the GPU writes it, a thread of lk sees it while it spins, and the GPU
waits for the answer. Nobody has to wake up, but a core is busy while sequences decode.
"""

import time
import weakref
from collections.abc import Callable
from typing import TypeAlias

import torch

from lvllm.engine.ops import raw_ops
from lvllm.gpu.accelerator import Accelerator, Stream

__all__ = ["Call", "faster", "through_function", "through_mailbox"]

Call: TypeAlias = Callable[[int, Stream], None]
"""Puts the call of a HostCall, by its address, in a stream. It may be captured in a graph."""

TIMED = 200
"""How many calls are timed. They take some milliseconds together."""


def through_function(accelerator: Accelerator) -> Call:
    """Return calls through a function of the host."""
    function: int = raw_ops.host_call_function()

    def call(argument: int, stream: Stream) -> None:
        accelerator.call(function, argument, stream)

    return call


def through_mailbox(accelerator: Accelerator) -> Call:
    """Return calls through a mailbox, whose thread ends with the last reference to the result.

    Raises RuntimeError if the device or its driver cannot write and await words in a stream.
    """
    words = accelerator.pinned((16,), torch.int64).zero_()
    request, answer = words.data_ptr(), words.data_ptr() + 64
    stream = accelerator.compute()
    accelerator.write_word(answer, 0, stream)  # This fails here rather than in a first request.
    accelerator.synchronize(stream)
    mailbox = raw_ops.mailbox_create(words)

    def call(argument: int, stream: Stream) -> None:
        accelerator.write_word(request, argument, stream)
        accelerator.await_word(answer, argument, stream)
        accelerator.write_word(answer, 0, stream)  # The next call finds it unset.

    # A closure's cells live as long as the function, and so do the words.
    weakref.finalize(call, _close, mailbox, words).atexit = False
    return call


def faster(accelerator: Accelerator, argument: int) -> tuple[Call, str]:
    """Time both with the HostCall at `argument`, and return the faster one with a line about it."""
    function = through_function(accelerator)
    try:
        mailbox = through_mailbox(accelerator)
        times = [_microseconds(accelerator, call, argument) for call in (function, mailbox)]
    except RuntimeError as error:
        return function, f"hostfunc, since a mailbox is not possible: {error}"
    chosen = "mailbox" if times[1] < times[0] else "hostfunc"
    said = f"{chosen}: a call takes {times[0]:.1f} us as hostfunc, {times[1]:.1f} us as mailbox"
    return (mailbox if chosen == "mailbox" else function), said


def _microseconds(accelerator: Accelerator, call: Call, argument: int) -> float:
    """Return the time from one call to the next, once a first one has been made."""
    stream = accelerator.compute()
    call(argument, stream)
    accelerator.synchronize(stream)
    begin = time.perf_counter()
    for _ in range(TIMED):
        call(argument, stream)
    accelerator.synchronize(stream)
    return 1e6 * (time.perf_counter() - begin) / TIMED


def _close(mailbox: int, words: torch.Tensor) -> None:
    """End the mailbox's thread, and free the words after it."""
    raw_ops.mailbox_destroy(mailbox)
    del words
