"""Set up GPU offload for a model that is being built, from LvLLM's settings and vLLM's."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import torch
from torch.distributed import ReduceOp
from vllm import envs
from vllm.config import get_current_vllm_config
from vllm.distributed import get_ep_group, get_world_group

from lvllm import startup
from lvllm.checkpoint.moe_layers import layer_number
from lvllm.faults import process
from lvllm.gpu import MeasuredThreshold, Offload, Watchdog, host_calls, open_accelerator
from lvllm.settings.configuration import HybridConfig
from lvllm.units import MIB

__all__ = ["join"]


def join(prefix: str) -> tuple[Offload, int] | None:
    """Announce the experts called `prefix` to the `Offload` of their model.

    Returns the `Offload` and the layer's number, or None without an accelerator. Raises ValueError
    for a layer whose name has no number.
    """
    config = HybridConfig.current()
    if config.accelerator == "none":
        return None
    number = layer_number(prefix)
    if number is None:
        raise ValueError(f"{prefix}: LVLLM_ACCELERATOR wants a layer with a number in its name")
    return Offload.announce(number, get_current_vllm_config(), lambda: _make(config)), number


def _make(config: HybridConfig) -> Offload:
    vllm_config = get_current_vllm_config()
    threshold: int | MeasuredThreshold
    if config.gpu_prefill_min_batch_size == "auto":
        # A batch that runs from a captured graph is computed on the CPU, so the threshold lies
        # above the largest graph.
        in_graphs = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        threshold = MeasuredThreshold(vllm_config.model_config.dtype, _slowest, least=in_graphs + 1)
    else:
        threshold = config.gpu_prefill_min_batch_size
    accelerator, seconds = open_accelerator(config.accelerator), config.watchdog_seconds
    watchdog = Watchdog(accelerator, seconds, process.end_now, host_calls) if seconds else None
    return Offload(
        accelerator,
        tokens=vllm_config.scheduler_config.max_num_batched_tokens,
        threshold=threshold,
        ahead=config.gpu_prefetch_window,
        staging_bytes=config.gpu_staging_mib * MIB,
        call=config.gpu_call,
        cache_bytes=_of_rank(config.gpu_expert_cache),
        reads_path=_reads_path(vllm_config),
        defer=config.defer_experts,
        watchdog=watchdog,
        dtype=vllm_config.model_config.dtype,
    )


def _of_rank(sizes: Sequence[int | Literal["auto"]]) -> int | Literal["auto"]:
    """The size for this rank's GPU. There is one for all ranks of the host, or one for each."""
    return sizes[startup.host_rank()] if len(sizes) > 1 else sizes[0]


def _reads_path(vllm_config: Any) -> Path:
    """Where this rank saves how often its experts are read.

    This is beside the model, or in vLLM's cache if the model is not in a folder of the user's. The
    name is not one of a file with weights: a model without an index has all those in its folder.
    """
    world = get_world_group()
    name = f"lvllm-expert-reads-{world.rank_in_group + 1}-of-{world.world_size}.counts"
    folder = Path(vllm_config.model_config.model)
    if folder.is_dir() and os.access(folder, os.W_OK):
        return folder / name
    return Path(envs.VLLM_CACHE_ROOT) / "lvllm" / quote(str(folder), safe="") / name


def _slowest(seconds: Sequence[float]) -> Sequence[float]:
    """For each measured time, the largest among the ranks that hold parts of the same layers.

    These are the ranks, of all replicas, that divide the experts or their rows within one stage of
    the pipeline. All of them must call this together.
    """
    group, largest = get_ep_group(), torch.tensor(seconds, dtype=torch.float64)
    if group.world_size > 1:
        try:
            torch.distributed.all_reduce(largest, ReduceOp.MAX, group=group.cpu_group)
        except RuntimeError:
            process.follow()  # A rank that could not load its layers has ended by now.
            raise
    return largest.tolist()
