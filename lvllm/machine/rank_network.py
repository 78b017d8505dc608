"""The networks on which ranks talk: loopback on one host, and that of the others among several."""

import ipaddress
import os
import socket
from typing import Any

import psutil

from lvllm.errors import LvllmError

__all__ = ["ADDRESS", "INTERFACE", "choose", "is_loopback", "take_network_of"]

INTERFACE = "GLOO_SOCKET_IFNAME"
"""PyTorch's variable for the network interfaces of its gloo groups, separated by commas."""
ADDRESS = "VLLM_HOST_IP"
"""vLLM's variable for this host's address, to which the ranks of other hosts connect."""


def choose(parallel: Any) -> None:
    """Let all ranks use the loopback interface if they are on one host, else the others' network.

    Each gloo group of each rank listens for the others and asks for no password, by default on the
    address to which the host's name resolves. That is often the one of its network. Values that
    the user has set stay. `parallel` is vLLM's ParallelConfig. Ray is asked later, by its ranks.

    Raises LvllmError if the first host cannot be reached.
    """
    replicas = parallel.data_parallel_size > 1
    if parallel.nnodes > 1:
        take_network_of(_address_towards("--master-addr", parallel.master_addr))
    elif replicas and not is_loopback(first := parallel.data_parallel_master_ip):
        take_network_of(_address_towards("--data-parallel-address", first))
    elif parallel.distributed_executor_backend in ("mp", "uni"):
        os.environ.setdefault(INTERFACE, "lo")


def take_network_of(address: str) -> None:
    """Let this rank talk on the network in which this host has the IP address `address`.

    Otherwise vLLM takes the address of the default route, and 0.0.0.0 where there is none, to which
    the ranks of other hosts would connect for ever. gloo takes the address to which the host's name
    resolves, which is 127.0.1.1 on Debian and Ubuntu.
    """
    os.environ.setdefault(ADDRESS, address)
    for interface, addresses in psutil.net_if_addrs().items():
        if any(one.address == address for one in addresses):
            os.environ.setdefault(INTERFACE, interface)


def is_loopback(host: str) -> bool:
    """Whether only processes of this host can reach the address or name."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _address_towards(option: str, host: str) -> str:
    """This host's address in the network in which it reaches `host`. Nothing is sent."""
    try:
        family, kind, _, _, there = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as asking:
            asking.connect(there)
            found: str = asking.getsockname()[0]
    except OSError as error:
        raise LvllmError(
            f"{option} {host} cannot be reached from here ({error.strerror}): it must be the"
            " first host's address or name in the network of the ranks"
        ) from None
    return found
