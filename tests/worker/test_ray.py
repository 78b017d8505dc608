"""What a rank on a Ray cluster takes from the front process, and what from its own machine."""

import os
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from vllm.v1.executor.ray_executor_v2 import RayWorkerProc

from lvllm import prepare
from lvllm.machine import cpus
from lvllm.machine.rank_network import ADDRESS, INTERFACE
from lvllm.settings.configuration import RESOLVED, HybridConfig
from lvllm.worker.ray import HybridRayWorkerProc


def test_each_machine_divides_its_own_cpus(
    vllm_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine of four cores, for two ranks."""
    config = HybridConfig.carried(vllm_config)
    config = config.model_copy(update={"engine_cpus": (), "omp_cpus": ()})
    carried = SimpleNamespace(additional_config={RESOLVED: config.model_dump(mode="json")})
    carried.model_config = vllm_config.model_config
    monkeypatch.setattr(cpus, "this_machine", lambda: [[(4,), (5,), (6,), (7,)]])
    monkeypatch.setattr(prepare.limits, "cpu_quota", lambda: None)
    monkeypatch.setattr(prepare.online, "experts", lambda config: None)
    pinned = list[Any]()
    monkeypatch.setattr(os, "sched_setaffinity", lambda process, cpus: pinned.append(cpus))
    monkeypatch.setattr(torch, "set_num_threads", pinned.append)
    loaded = list[Any]()
    monkeypatch.setattr(
        RayWorkerProc, "initialize_worker", lambda self, *given: loaded.extend(given)
    )
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # by Ray
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    for name in ("_LVLLM_FAILURE", "LK_THREADS", "HERE", ADDRESS, INTERFACE):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("THERE", "ours")
    worker = HybridRayWorkerProc.__new__(HybridRayWorkerProc)
    worker._is_driver_node = False
    worker._init_kwargs = {"vllm_config": carried}
    theirs = {"_LVLLM_FAILURE": "1:2", "HERE": "theirs", "THERE": "theirs"}
    worker.initialize_worker(1, {}, "tcp://host:1", theirs, assigned_physical_gpu_ids=[0, 0])

    assert pinned == [(6, 7), 2]
    divided = HybridConfig.carried(carried)
    assert divided.engine_cpus == divided.omp_cpus == ((4, 5), (6, 7))
    assert (os.environ["HERE"], os.environ["THERE"]) == ("theirs", "ours")
    assert "_LVLLM_FAILURE" not in os.environ
    assert (os.environ[ADDRESS], os.environ[INTERFACE]) == ("127.0.0.1", "lo")
    assert loaded == [1, {}, "tcp://host:1"]
