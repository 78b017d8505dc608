"""In a worker process: start the engine once, on the CPUs that the front process chose for it."""

import os
from functools import lru_cache

from vllm.config import get_current_vllm_config
from vllm.distributed import get_world_group
from vllm.platforms import current_platform

from lvllm import engine, sharing
from lvllm.settings.configuration import HybridConfig

__all__ = ["host_rank", "start_engine"]


def host_rank() -> int:
    """This worker's number among those of this host, one data-parallel replica after the other.

    vLLM's CPU platform counts local ranks from 0 in each replica; its CUDA platform counts through
    all replicas, as here.
    """
    rank = int(get_world_group().local_rank)
    if not current_platform.is_cpu():
        return rank
    parallel = get_current_vllm_config().parallel_config
    return int(parallel.data_parallel_rank_local or 0) * int(parallel.local_world_size) + rank


def start_engine(rank: int) -> engine.EngineInfo:
    """Start the engine's threads for the worker with this `host_rank`, and say what it runs on.

    Every layer of a model calls this; the first call starts the threads.
    """
    config = HybridConfig.current()
    info = _start(config, rank)
    if config.shared_experts is not None:
        sharing.join(f"{config.shared_experts}/{_rank_of_all()}")
    else:
        sharing.apart()
    return info


def _rank_of_all() -> int:
    """This worker's number in its whole engine, one data-parallel replica after the other."""
    parallel = get_current_vllm_config().parallel_config
    rank: int = get_world_group().rank_in_group
    return int(parallel.data_parallel_rank * parallel.world_size + rank)


@lru_cache(maxsize=1)
def _start(config: HybridConfig, rank: int) -> engine.EngineInfo:
    cpus = config.engine_cpus[rank]
    # OpenMP has pinned this thread to a single CPU by now, and the engine looks for its CPUs in
    # the affinity mask of the calling thread.
    pinned = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        engine.configure(
            threads=len(cpus),
            cpus=cpus,
            binding=config.thread_binding.value,
            power_saving=config.power_saving,
            interleave=config.numa_interleave,
            shared=config.shared_experts is not None,
        )
        return engine.info()
    finally:
        os.sched_setaffinity(0, pinned)
