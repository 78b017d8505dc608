"""Python threads for PyTorch's work on many matrices: a thread a matrix.

PyTorch divides one operation among OpenMP's threads, which wait for each other after it. Of many
small ones that is slow, and very slow where other processes take a core now and then: quantising
1 GiB took 25 s with two such threads on two busy cores, and 4.3 s with two of these.
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
    """Threads that run on `cpus` (the calling one may be pinned to one of them), each with all of
    an operation to itself. Other threads keep what they have.
    """
    return ThreadPoolExecutor(threads, "lvllm-work", _start, (tuple(cpus),))


def _start(cpus: tuple[int, ...]) -> None:
    os.sched_setaffinity(0, cpus)
    # torch.set_num_threads would change it for the whole process; of OpenMP it is a thread's own.
    # PyTorch hands the process's number to OpenMP when it is first used in a thread: before ours.
    torch.get_num_threads()
    for library in _openmp():
        ctypes.CDLL(library).omp_set_num_threads(1)


def _openmp() -> set[str]:
    """The OpenMP libraries in this process."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {
        line.split(maxsplit=5)[5] for line in lines if re.search(r"/lib[gi]?omp[^/]*\.so", line)
    }
