"""One thread that waits for the network in a process, in the place of one for each group of ranks.

vLLM makes some fifteen groups in each worker, even in one without other ranks. PyTorch gives each
group of Gloo a device of its own, whose thread wakes up every 10 ms to see whether it is to end.
"""

import functools
import os
from datetime import timedelta
from typing import Any

from lvllm.machine.rank_network import INTERFACE
from lvllm.patches.registry import patch

__all__ = ["share_devices"]


@patch(
    "torch.distributed.distributed_c10d:ProcessGroupGloo",
    signature="pybind11_type",
    why="Each group of ranks has a thread that wakes up 100 times a second. The fifteen of a worker"
    " take 1.0 to 1.7% of a core (Zen 4) while a server is idle, and each further worker as much.",
    upstream="none, because PyTorch's class takes shared devices; only its new_group() does not"
    " offer it",
    until="vLLM makes no groups that are not used, or Gloo's thread sleeps",
    checked=("2.13.0",),
    platform="cpu",
)
def share_devices(original: Any) -> Any:
    from torch.distributed.distributed_c10d import default_pg_timeout

    @functools.cache
    def devices(process: int, interfaces: str) -> list[Any]:
        """Those of a process: a forked one has none of its parent's threads."""
        names = filter(None, interfaces.split(","))
        made = [original.create_device(interface=name) for name in names]
        return made or [original.create_default_device()]

    class ProcessGroupGloo(original):  # type: ignore[misc]
        def __init__(
            self, store: Any, rank: int, size: int, timeout: Any = default_pg_timeout
        ) -> None:
            options = timeout
            if isinstance(timeout, timedelta):  # There may be options in its place.
                options = original._Options()
                options._devices = devices(os.getpid(), os.environ.get(INTERFACE, ""))
                options._threads = 2 * len(options._devices)  # as in PyTorch
                options._timeout = timeout
            super().__init__(store, rank, size, options)

    return ProcessGroupGloo
