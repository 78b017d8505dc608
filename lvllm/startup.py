"""Start the engine once in a worker process, on the CPUs that the front process chose for it."""

import os
from functools import lru_cache

from vllm.config import get_current_vllm_config
from vllm.distributed import get_world_group
from vllm.platforms import current_platform

from lvllm import engine, sharing
from lvllm.settings.configuration import HybridConfig

__all__ = ["host_rank", "start_engine"]


def host_rank() -> int:
    """This worker's number among all workers of this host, counted replica by replica.

    vLLM's CPU platform numbers local ranks from 0 in each data-parallel replica. Its CUDA platform
    numbers them through all replicas, as this function does.
    """
    rank = int(get_world_group().local_rank)
    if not current_platform.is_cpu():
        return rank
    parallel = get_current_vllm_config().parallel_config
    return int(parallel.data_parallel_rank_local or 0) * int(parallel.local_world_size) + rank


def start_engine(rank: int) -> engine.EngineInfo:
    """Start the engine's threads for the worker with this `host_rank`; return what they run on.

    Every layer of a model calls this; the first call starts the threads.
    """
    config = HybridConfig.current()
    info = _start(config, rank)
    if config.shared_experts is not None:
        sharing.join(f"{config.shared_experts}/{_rank_of_all()}", config.bank)
    else:
        sharing.stop()
    return info


def _rank_of_all() -> int:
    """This worker's number among the workers of all hosts, counted replica by replica."""
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
            own_cores=config.own_cores,
            interleave=config.numa_interleave,
            shared=config.shared_experts is not None,
        )
        return engine.info()
    finally:
        os.sched_setaffinity(0, pinned)
