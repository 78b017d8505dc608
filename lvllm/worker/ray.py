"""Ranks of a model on the machines of a Ray cluster, without GPUs.

vLLM's executor starts an actor for each rank, and tells it the environment of the front process.
Each machine divides its own CPUs among its ranks.
"""

import os
from typing import Any

import ray
import torch
from vllm.v1.executor.ray_executor_v2 import RayExecutorV2, RayWorkerProc

from lvllm import prepare
from lvllm.errors import LvllmError
from lvllm.faults import process
from lvllm.machine.rank_network import ADDRESS, take_network_of
from lvllm.patches import install
from lvllm.patches.ray_cluster import RANKS
from lvllm.patches.registry import ON_RAY
from lvllm.settings.configuration import HybridConfig

__all__ = ["HybridRayExecutor", "HybridRayWorkerProc"]

FROM_THE_START = ("LD_PRELOAD", "LVLLM_MOE_NUMA_ENABLED", "GOMP_SPINCOUNT")
"""Variables that are read before vLLM tells an actor the environment."""

OF_THIS_HOST = "_LVLLM_"
"""How the names of variables begin that name files of the front process."""


class HybridRayExecutor(RayExecutorV2):
    """vLLM's executor for Ray, which ends in one line where the cluster or a rank fails."""

    def _init_executor(self) -> None:
        install("cpu", ON_RAY)
        try:
            self._join_cluster()
            super()._init_executor()
        except LvllmError as error:  # Ray gives an actor's error this type, too.
            process.end(str(getattr(error, "cause", error)))

    def _join_cluster(self) -> None:
        """Raise LvllmError if there is no cluster, or one that can never take all ranks."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if not ray.is_initialized():
            try:
                ray.init("auto", runtime_env=self.parallel_config.ray_runtime_env)
            except ConnectionError:
                raise LvllmError(
                    "distributed-executor-backend=ray: no Ray cluster is running here, and"
                    " RAY_ADDRESS names none: start one with `ray start` (docs/ray.md)"
                ) from None
        # Not gloo's interface, which vLLM would copy to hosts that name theirs otherwise.
        os.environ.setdefault(ADDRESS, ray.util.get_node_ip_address())
        ranks = self.parallel_config.world_size
        places = int(ray.cluster_resources().get(RANKS, 0))
        if places < ranks:
            raise LvllmError(
                f"the model is divided among {ranks} ranks, and the nodes of the Ray cluster take"
                f" {places}: `ray start --resources '{{\"{RANKS}\": 1}}'` starts a node that takes"
                " one (docs/ray.md)"
            )

    def _build_runtime_env(self) -> dict[str, Any]:
        environment: dict[str, Any] = super()._build_runtime_env()
        environment["env_vars"] |= {
            name: os.environ[name] for name in FROM_THE_START if name in os.environ
        }
        return environment


class HybridRayWorkerProc(RayWorkerProc):
    """vLLM's actor, on the CPUs of its own machine."""

    def get_node_and_physical_gpu_ids(self) -> tuple[str, list[int]]:
        """The node, and one number for this rank, so that the executor can count the node's ranks.

        vLLM asks Ray for GPUs here.
        """
        return ray.get_runtime_context().get_node_id(), [0]

    def initialize_worker(
        self,
        local_rank: int,
        env_vars: dict[str, str],
        distributed_init_method: str,
        driver_env_vars: dict[str, str] | None = None,
        assigned_physical_gpu_ids: list[int] | None = None,
    ) -> None:
        """Load this rank's part of the model. Raises LvllmError."""
        theirs = dict(driver_env_vars or {})
        if not self._is_driver_node:
            theirs = {name: v for name, v in theirs.items() if not name.startswith(OF_THIS_HOST)}
        os.environ.pop("OMP_NUM_THREADS", None)  # Ray sets 1 for actors that ask for no CPUs of it.
        for name, value in theirs.items():
            os.environ.setdefault(name, value)
        take_network_of(ray.util.get_node_ip_address())
        vllm_config = self._init_kwargs["vllm_config"]
        prepare.divide_host(vllm_config, ranks=len(assigned_physical_gpu_ids or [0]))
        cpus = HybridConfig.carried(vllm_config).omp_cpus[local_rank]
        os.sched_setaffinity(0, cpus)
        torch.set_num_threads(len(cpus))
        super().initialize_worker(local_rank, env_vars, distributed_init_method)
