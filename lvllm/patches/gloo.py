"""One thread that waits for the network in a process, in the place of one for each group of ranks.

vLLM makes some fifteen groups in each worker, even in one without other ranks. PyTorch gives each
group of Gloo a device of its own, whose thread wakes up every 10 ms to see whether it is to end.
"""

import os
from datetime import timedelta
from typing import Any

from lvllm.patches.registry import patch

__all__ = ["share_devices"]

INTERFACES = "GLOO_SOCKET_IFNAME"
"""PyTorch's variable for the interfaces of Gloo, separated by commas."""
DEFAULT = timedelta(minutes=30)
"""PyTorch's own timeout."""


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
    known: dict[tuple[int, str], list[Any]] = {}

    def devices() -> list[Any]:
        """Those of this process: a forked one has none of its parent's threads."""
        names = os.environ.get(INTERFACES, "")
        key = os.getpid(), names
        if key not in known:
            known[key] = [
                original.create_device(interface=name) for name in names.split(",") if name
            ] or [original.create_default_device()]
        return known[key]

    class ProcessGroupGloo(original):  # type: ignore[misc]
        def __init__(self, store: Any, rank: int, size: int, timeout: Any = DEFAULT) -> None:
            options = timeout
            if isinstance(timeout, timedelta):  # There may be options in its place.
                options = original._Options()
                options._devices = devices()
                options._threads = 2 * len(options._devices)  # as in PyTorch
                options._timeout = timeout
            super().__init__(store, rank, size, options)

    return ProcessGroupGloo
