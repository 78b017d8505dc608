"""Which ranks talk over the loopback interface, and where their stores listen."""

import os
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from torch.distributed import TCPStore

from lvllm.machine.loopback import INTERFACE, keep_ranks_on_loopback
from lvllm.patches.loopback import listen_where_it_is_asked


@pytest.mark.parametrize(
    ("changes", "interface"),
    [
        ({}, "lo"),
        ({"distributed_executor_backend": "uni"}, "lo"),
        ({"data_parallel_size": 2}, "lo"),
        ({"data_parallel_size": 2, "data_parallel_master_ip": "192.0.2.1"}, None),
        ({"data_parallel_master_ip": "192.0.2.1"}, "lo"),
        ({"nnodes": 2}, None),
        ({"distributed_executor_backend": "ray"}, None),
    ],
)
def test_ranks_of_one_host(
    changes: dict[str, Any], interface: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    parallel = {
        "nnodes": 1,
        "distributed_executor_backend": "mp",
        "data_parallel_size": 1,
        "data_parallel_master_ip": "127.0.0.1",
    }
    monkeypatch.delenv(INTERFACE, raising=False)
    keep_ranks_on_loopback(SimpleNamespace(**parallel | changes))
    assert os.environ.pop(INTERFACE, None) == interface
    monkeypatch.setenv(INTERFACE, "eth7")
    keep_ranks_on_loopback(SimpleNamespace(**parallel | changes))
    assert os.environ[INTERFACE] == "eth7"


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
