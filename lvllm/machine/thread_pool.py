"""A pool of Python threads that use PyTorch on many matrices, one thread on each matrix.

By itself PyTorch divides each operation among OpenMP's threads, which wait for each other at its
end. That is slow for many small operations, and very slow where other processes take a core now and
then: quantising 1 GiB took 25 s with two OpenMP threads on two busy cores, and 4.3 s with two
threads of this pool.
"""

import ctypes
import os
import re
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

__all__ = ["pool"]


def pool(threads: int, cpus: Collection[int]) -> ThreadPoolExecutor:
    """A pool whose threads run on `cpus`. Each of them computes without OpenMP's threads.

    The calling thread may be pinned to one CPU; the threads of the pool are not. Threads outside
    the pool keep their CPUs and their number of OpenMP threads.
    """
    return ThreadPoolExecutor(threads, "lvllm-work", _start, (tuple(cpus),))


def _start(cpus: tuple[int, ...]) -> None:
    os.sched_setaffinity(0, cpus)
    # torch.set_num_threads would change the number for the whole process. OpenMP's own function
    # changes it for this thread only. When a thread first uses PyTorch, PyTorch passes the
    # process's number to OpenMP, so that must happen before we set ours.
    torch.get_num_threads()
    for library in _openmp():
        ctypes.CDLL(library).omp_set_num_threads(1)


def _openmp() -> set[str]:
    """The paths of the OpenMP libraries that this process has loaded."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {
        line.split(maxsplit=5)[5] for line in lines if re.search(r"/lib[gi]?omp[^/]*\.so", line)
    }
