"""Stores of PyTorch that would answer the network though all of their ranks are on one host."""

import socket
from typing import Any

from lvllm.patches.registry import patch

__all__ = ["listen_where_it_is_asked"]


@patch(
    "vllm.distributed.utils:TCPStore",
    signature="pybind11_type",
    why="PyTorch's TCPStore listens on all addresses of a machine, whatever address it is given,"
    " and asks for no password. Data-parallel replicas find each other there and read pickles from"
    " it, so that whoever reaches the port can run code in them. A store of the loopback address"
    " listens there alone.",
    upstream="none, because vLLM leaves it to a firewall:"
    " https://docs.vllm.ai/en/latest/usage/security.html",
    until="TCPStore listens on the address that it is given",
)
def listen_where_it_is_asked(original: Any) -> Any:
    from lvllm.machine.rank_network import is_loopback

    def make(host_name: str, port: int, *arguments: Any, **options: Any) -> Any:
        if (
            options.get("is_master")
            and is_loopback(host_name)
            and "master_listen_fd" not in options
        ):
            family = socket.AF_INET6 if ":" in host_name else socket.AF_INET
            listening = socket.create_server((host_name, port), family=family)
            port = listening.getsockname()[1]
            options["master_listen_fd"] = listening.detach()  # The store closes it.
        return original(host_name, port, *arguments, **options)

    return make
