"""Times what a host call costs a stream: CUDA's host functions against a mailbox.

A mailbox is two words of pinned memory. The GPU writes the first word and waits for the second
(cuStreamWriteValue32, cuStreamWaitValue32). A thread of the host polls the first word and answers
in the second. Both do nothing in between. Events time them, in a stream and in a graph.
"""

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import torch

from lvllm.gpu.accelerator import Accelerator

__all__ = ["Mailbox", "costs", "helpers", "serving"]

CALLS = 1000
IN_GRAPH = 100
EQUAL = 1  # CU_STREAM_WAIT_VALUE_EQ
LINE = 16  # words of 4 bytes in a cache line

SOURCE = r"""
#include <atomic>
#include <cstdint>

extern "C" void nothing(void*) {}

// Answers until it is told to end. Words a cache line apart: request, answer, end.
extern "C" void answer(std::atomic<uint32_t>* words) {
  while (true) {
    while (words[0].load(std::memory_order_acquire) == 0) {
      if (words[32].load(std::memory_order_relaxed) != 0) return;
      __builtin_ia32_pause();
    }
    // Before the answer: after it, the next request may come.
    words[0].store(0, std::memory_order_relaxed);
    words[16].store(1, std::memory_order_release);
  }
}
"""


def helpers() -> ctypes.CDLL:
    """Compile the functions `nothing` and `answer`."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "helpers.cpp"), Path(folder, "helpers.so")
        source.write_text(SOURCE)
        compiler = os.environ.get("CXX", "g++")
        command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(source)]
        subprocess.run(command, check=True)
        return ctypes.CDLL(str(library))


class Mailbox:
    """Makes host calls of a stream through a mailbox.

    Args:
        driver: libcuda.
        words: int32 [3 * LINE], pinned.
    """

    def __init__(self, driver: ctypes.CDLL, words: torch.Tensor) -> None:
        self._words = words.zero_()
        # Graphs can only hold the second versions of these functions. With unified addressing,
        # pinned memory has the same address on the device.
        self._write = driver.cuStreamWriteValue32_v2
        self._wait = driver.cuStreamWaitValue32_v2
        for function in (self._write, self._wait):
            function.argtypes = (
                ctypes.c_void_p,
                ctypes.c_uint64,
                ctypes.c_uint32,
                ctypes.c_uint,
            )

    def call(self, stream: int) -> None:
        """Queue a call. Raises RuntimeError with CUDA's code."""
        request = self._words.data_ptr()
        answer = request + 4 * LINE
        for code in (
            self._write(stream, request, 1, 0),
            self._wait(stream, answer, 1, EQUAL),
            self._write(stream, answer, 0, 0),  # The next call or replay finds it unset.
        ):
            if code != 0:
                raise RuntimeError(f"a stream's memory operation fails: CUresult {code}")


@contextmanager
def serving(library: ctypes.CDLL, words: torch.Tensor) -> Iterator[None]:
    """Let a thread of the host answer while the context is open."""
    library.answer.argtypes = (ctypes.c_void_p,)
    thread = Thread(target=library.answer, args=(words.data_ptr(),), daemon=True)
    thread.start()
    try:
        yield
    finally:
        words[2 * LINE] = 1
        thread.join()


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
    library = helpers()
    nothing = ctypes.cast(library.nothing, ctypes.c_void_p).value
    assert nothing is not None
    host: tuple[object, ...] = ("host function",)
    host += _both(lambda: accelerator.call(nothing, 0, accelerator.compute()))
    words = accelerator.pinned((3 * LINE,), torch.int32)
    try:
        mailbox = Mailbox(ctypes.CDLL("libcuda.so.1"), words)
        with serving(library, words):
            times = _both(lambda: mailbox.call(accelerator.compute().cuda_stream))
    except (AttributeError, OSError, RuntimeError) as error:
        return [host, ("mailbox", f"not here: {error}")]
    return [host, ("mailbox", *times)]
