"""What happens once a process: settings resolved in front, the engine started in a worker."""

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from lvllm import engine, sharing
from lvllm.checkpoint.headers import Checkpoint
from lvllm.faults import process
from lvllm.machine import cpus, gpu_distance
from lvllm.prefill import setting
from lvllm.settings.configuration import CPU_WORKER, GPU_WORKER, RESOLVED, HybridConfig


def machine() -> cpus.Machine:
    """The CPUs that this process may use."""
    return [node.cores for node in engine.topology().nodes]


def prepare(vllm_config: Any) -> None:
    """In the front process: check the settings and the checkpoint, and leave what the workers need.

    Raises lvllm.settings.variables.SettingError or lvllm.checkpoint.headers.CheckpointError.
    """
    if vllm_config.model_config is None or RESOLVED in vllm_config.additional_config:
        return
    if _is_one_of_several_api_servers(vllm_config.parallel_config):
        return  # the process that starts them has checked, and the engines take memory by now
    config = HybridConfig.of(vllm_config, machine(), gpu_distance.of_gpus())
    _check_checkpoint(vllm_config)
    process.prepare()
    if config.prefill_engine is not None:
        config = setting.prepare(vllm_config, config.prefill_engine, config)
    vllm_config.additional_config[RESOLVED] = config.model_dump(mode="json")
    if config.accelerator != "cuda":
        _prepare_cpu_platform(vllm_config, config)
    elif vllm_config.parallel_config.worker_cls == GPU_WORKER:
        # Upstream's worker, which ends a step with an error that one of lk's callbacks met.
        vllm_config.parallel_config.worker_cls = "lvllm.worker.gpu.HybridGPUWorker"
        _keep_streamed_batches_out_of_graphs(
            vllm_config.compilation_config, config.gpu_prefill_min_batch_size
        )


def _keep_streamed_batches_out_of_graphs(compilation: Any, threshold: int | str) -> None:
    """What runs from a graph is computed on the CPU: vLLM's sizes may reach beyond the threshold.

    One size at least is left, for vLLM's graphs cannot do with none. A threshold that is measured
    comes too late for this, and is never below them.
    """
    if isinstance(threshold, str):
        return
    sizes = sorted(compilation.cudagraph_capture_sizes or ())
    shorter = [size for size in sizes if size < threshold] or sizes[:1]
    if threshold and shorter:
        compilation.cudagraph_capture_sizes = shorter
        compilation.max_cudagraph_capture_size = shorter[-1]


def _is_one_of_several_api_servers(parallel: Any) -> bool:
    """Data parallelism has as many in front as there are replicas. Who starts them has rank -1."""
    return parallel._api_process_count > 1 and parallel._api_process_rank >= 0


def _prepare_cpu_platform(vllm_config: Any, config: HybridConfig) -> None:
    # Upstream's worker, with a watch over the experts' output.
    if vllm_config.parallel_config.worker_cls == CPU_WORKER:
        vllm_config.parallel_config.worker_cls = "lvllm.worker.cpu.HybridCPUWorker"
    # Attention between a picture's tokens needs all of them in one step, as vLLM has it on GPUs.
    if vllm_config.model_config.is_mm_prefix_lm:
        vllm_config.scheduler_config.disable_chunked_mm_input = True
    # vLLM binds the OpenMP threads of rank n to the n-th list. Its own division ("auto") wants a
    # NUMA node a rank and keeps a core free; ours gives PyTorch the cores that lk computes on,
    # since the two take turns.
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(
        ",".join(map(str, cpus)) for cpus in config.omp_cpus
    )
    # For the same reason OpenMP's threads must not spin for milliseconds after their part. At about
    # 10 us, decoding a 2 GiB model on 2 cores went from 88 to 120 tokens per second; sleeping at
    # once (OMP_WAIT_POLICY=passive) gave 102, for the wake-ups inside attention cost as much.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def _check_checkpoint(vllm_config: Any) -> None:
    """The headers of what lies in a local folder; what is downloaded is checked when it is read."""
    folder, load_format = Path(vllm_config.model_config.model), vllm_config.load_config.load_format
    if not vllm_config.model_config.get_num_experts() or not folder.is_dir():
        return
    if any(folder.glob("*/*.safetensors")) and not any(folder.glob("*.safetensors")):
        return  # vLLM knows the models that keep theirs in folders below
    if load_format == "auto" and any(folder.glob("consolidated*.safetensors")):
        # vLLM prefers Mistral's own format where a folder has both.
        index = "consolidated.safetensors.index.json"
        Checkpoint.open(folder, "consolidated*.safetensors", index)
    elif load_format in ("auto", "hf", "safetensors"):
        Checkpoint.open(folder)


def host_rank() -> int:
    """In a worker: its number among those of this host, one data-parallel replica after the other.

    vLLM's CPU platform counts local ranks from 0 in each replica, its CUDA platform does as here.
    """
    from vllm.config import get_current_vllm_config
    from vllm.distributed import get_world_group
    from vllm.platforms import current_platform

    rank = int(get_world_group().local_rank)
    if not current_platform.is_cpu():
        return rank
    parallel = get_current_vllm_config().parallel_config
    return int(parallel.data_parallel_rank_local or 0) * int(parallel.local_world_size) + rank


def start_engine(rank: int) -> engine.EngineInfo:
    """In a worker, with its `host_rank`: what runs. Every layer asks; the first of a model starts
    the threads.
    """
    config = HybridConfig.current()
    info = _start(config, rank)
    if config.shared_experts is not None:
        sharing.join(f"{config.shared_experts}/{_rank_of_all()}")
    else:
        sharing.apart()
    return info


def _rank_of_all() -> int:
    """The worker's number in its engine, one data-parallel replica after the other."""
    from vllm.config import get_current_vllm_config
    from vllm.distributed import get_world_group

    parallel = get_current_vllm_config().parallel_config
    rank: int = get_world_group().rank_in_group
    return int(parallel.data_parallel_rank * parallel.world_size + rank)


@lru_cache(maxsize=1)
def _start(config: HybridConfig, rank: int) -> engine.EngineInfo:
    cpus = config.engine_cpus[rank]
    # OpenMP has pinned this thread to a single CPU by now, and the engine looks for its CPUs in
    # the calling thread's affinity mask.
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
