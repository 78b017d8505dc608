"""Keeps what the processes of one host say to each other off its network."""

import ipaddress
import os
from typing import Any

__all__ = ["INTERFACE", "is_loopback", "keep_ranks_on_loopback"]

INTERFACE = "GLOO_SOCKET_IFNAME"
"""PyTorch's variable for the network interfaces of its gloo groups, separated by commas."""


def keep_ranks_on_loopback(parallel: Any) -> None:
    """Let all ranks use the loopback interface if they are on one host.

    Each gloo group of each rank listens for the others and asks for no password, by default on the
    address to which the host's name resolves. That is often the one of its network. A value that
    the user has set stays. `parallel` is vLLM's ParallelConfig.
    """
    on_one_host = parallel.nnodes == 1 and parallel.distributed_executor_backend in ("mp", "uni")
    if parallel.data_parallel_size > 1:
        on_one_host = on_one_host and is_loopback(parallel.data_parallel_master_ip)
    if on_one_host:
        os.environ.setdefault(INTERFACE, "lo")


def is_loopback(host: str) -> bool:
    """Whether only processes of this host can reach the address or name."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
