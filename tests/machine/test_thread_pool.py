"""The thread pool for PyTorch's work on many matrices."""

import os

import torch

from lvllm.machine import thread_pool


def test_threads_compute_alone_on_the_given_cpus() -> None:
    torch.set_num_threads(torch.get_num_threads())  # A server may call this, too.
    before, cpus = torch.get_num_threads(), os.sched_getaffinity(0)

    def work(_: int) -> tuple[int, set[int], float]:
        total = torch.ones(1 << 20).mul(2).sum().item()
        return torch.get_num_threads(), os.sched_getaffinity(0), total

    last = {max(cpus)}
    with thread_pool.pool(3, last) as pool:
        assert all(done == (1, last, 2 << 20) for done in pool.map(work, range(6)))
    assert torch.get_num_threads() == before
    assert os.sched_getaffinity(0) == cpus
