"""On which network ranks talk, and where their stores listen."""

import os
import socket
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from torch.distributed import TCPStore

from lvllm.errors import LvllmError
from lvllm.machine import rank_network
from lvllm.machine.rank_network import ADDRESS, INTERFACE, is_loopback, take_network_of
from lvllm.patches.loopback import listen_where_it_is_asked

FIRST = "127.0.0.1"
"""An address that this host has, and reaches from the same."""


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (ADDRESS, INTERFACE):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def chosen(**changes: Any) -> tuple[str | None, str | None]:
    """The interface and the address of a rank, whose configuration is of one host but for this."""
    parallel = {
        "nnodes": 1,
        "master_addr": FIRST,
        "distributed_executor_backend": "mp",
        "data_parallel_size": 1,
        "data_parallel_master_ip": FIRST,
    }
    rank_network.choose(SimpleNamespace(**parallel | changes))
    return os.environ.pop(INTERFACE, None), os.environ.pop(ADDRESS, None)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, ("lo", None)),
        ({"distributed_executor_backend": "uni"}, ("lo", None)),
        ({"data_parallel_size": 2}, ("lo", None)),
        ({"data_parallel_master_ip": "192.0.2.1"}, ("lo", None)),
        ({"distributed_executor_backend": "ray"}, (None, None)),
        ({"nnodes": 2}, ("lo", FIRST)),
    ],
)
def test_the_network_of_the_ranks(
    changes: dict[str, Any], found: tuple[str | None, str | None]
) -> None:
    assert chosen(**changes) == found


def own_addresses() -> list[tuple[str, str]]:
    """The interfaces and IPv4 addresses of this host that are in a network."""
    return [
        (interface, one.address)
        for interface, addresses in psutil.net_if_addrs().items()
        for one in addresses
        if one.family == socket.AF_INET and not is_loopback(one.address)
    ]


def test_ranks_of_several_hosts_talk_where_the_first_one_is() -> None:
    for interface, address in own_addresses():
        take_network_of(address)
        assert os.environ.pop(INTERFACE) == interface
        assert os.environ.pop(ADDRESS) == address
        # Linux reaches an address of its own from that address.
        assert chosen(nnodes=2, master_addr=address) == (interface, address)
        replicas = {"data_parallel_size": 2, "data_parallel_master_ip": address}
        assert chosen(**replicas) == (interface, address)


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for changes in ({}, {"nnodes": 2}):
        monkeypatch.setenv(INTERFACE, "eth7")
        monkeypatch.setenv(ADDRESS, "192.0.2.7")
        assert chosen(**changes) == ("eth7", "192.0.2.7")


def test_a_first_host_that_nobody_knows() -> None:
    with pytest.raises(
        LvllmError, match=r"--master-addr nowhere\.invalid cannot be reached"
    ) as one:
        chosen(nnodes=2, master_addr="nowhere.invalid")
    assert "\n" not in str(one.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_store_listens_on_loopback_alone(host: str) -> None:
    make = listen_where_it_is_asked.make(TCPStore)
    options: dict[str, Any] = {"world_size": 2, "wait_for_workers": False, "multi_tenant": True}
    store = make(host, 0, is_master=True, **options)
    listening = [one.laddr for one in psutil.net_connections() if one.laddr[1:] == (store.port,)]
    assert {one.ip for one in listening} == {"127.0.0.1"}
    other = make(host, store.port, is_master=False, **options)
    other.set("key", "value")
    assert store.get("key") == b"value"
