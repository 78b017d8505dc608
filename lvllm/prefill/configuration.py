"""LVLLM_PREFILL_ENGINE: whether a model can have a prefill engine, and how each engine is set up.

The front process checks the setting and configures the decoding engine, whose configuration carries
what the prefill engine needs to know. The decoding engine makes the prefill engine's configuration
from its own.
"""

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lvllm.log import logger
from lvllm.prefill.executors import EXECUTORS
from lvllm.settings.configuration import RESOLVED, HybridConfig, PrefillEngine
from lvllm.settings.resolving import Setting
from lvllm.units import ceil_div

__all__ = ["SPARE_BLOCKS", "check", "configure", "kv_bytes_of_a_prompt", "prefill_configuration"]

MIN_TOKENS = 512
"""A prompt of this many tokens is long, unless the settings say otherwise. Handing a prompt over
costs one step of the decoding engine, which computes the last token, and some milliseconds of
copying.
"""
DRAFTS_WITHOUT_CACHE = ("ngram", "suffix")
"""Methods of speculative decoding whose drafts have no keys and values of their own."""
SPARE_BLOCKS = 4
"""Blocks of the prefill engine's cache beyond the longest prompt: vLLM's null block, and what a
scheduler that runs ahead of the worker takes.
"""


def check(
    settings: Mapping[str, Setting], accelerator: str, vllm_config: Any
) -> PrefillEngine | None:
    """LVLLM_PREFILL_ENGINE for this model, or None if there is to be one engine only.

    Raises SettingError for a model or another setting that two engines cannot serve.
    """
    wanted, gpu = settings["prefill_engine"], settings["prefill_engine_gpu"]
    if gpu.value is not None and not (wanted.value and accelerator == "cuda"):
        missing = "LVLLM_PREFILL_ENGINE is 0" if not wanted.value else "no engine runs on a GPU"
        raise gpu.refuse(f"{missing}; allowed is empty")
    if not wanted.value:
        return None
    if reason := _why_not(vllm_config):
        raise wanted.refuse(f"{reason}; allowed is 0")
    min_tokens = wanted.value
    if min_tokens == "auto":
        streamed = settings["gpu_prefill_min_batch_size"].value
        min_tokens = streamed if streamed and streamed != "auto" else MIN_TOKENS
    longest = vllm_config.model_config.max_model_len
    if min_tokens > longest:
        raise wanted.refuse(
            f"no prompt has {min_tokens} tokens, as max-model-len is {longest}; allowed is 0 or 2"
            f" to {longest}"
        )
    return PrefillEngine(min_tokens, gpu.value)


def _why_not(vllm_config: Any) -> str | None:
    """Why this configuration cannot have a prefill engine, or None if it can."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    speculative = vllm_config.speculative_config
    ranks = parallel.world_size * parallel.data_parallel_size
    backend = parallel.distributed_executor_backend
    method = speculative.method if speculative else DRAFTS_WITHOUT_CACHE[0]
    reasons = {
        f"{model.model} has no routed experts to share": not model.get_num_experts(),
        f"{model.model} does not generate": model.runner_type != "generate",
        f"{model.model} has layers whose state is not keys and values by token": model.is_hybrid
        or model.has_inner_state
        or model.is_attention_free
        or model.is_encoder_decoder,
        f"an engine of {ranks} workers hands nothing over yet": ranks > 1,
        f"distributed-executor-backend={backend!r} is neither 'mp' nor 'uni'": backend
        not in EXECUTORS,
        f"the draft of method {method!r} has keys and values of its own": method
        not in DRAFTS_WITHOUT_CACHE,
        "kv-transfer-config names a connector already": vllm_config.kv_transfer_config is not None,
        "enable-sleep-mode=True would end one engine's sleep alone": model.enable_sleep_mode,
    }
    return next((reason for reason, given in reasons.items() if given), None)


def kv_bytes_of_a_prompt(vllm_config: Any) -> int:
    """Bytes of the keys and values of the longest prompt that the model's configuration allows.

    The prefill engine's cache takes that much, and the memory between the engines at most as much
    again.
    """
    from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype

    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    dtype = kv_cache_dtype_str_to_dtype(vllm_config.cache_config.cache_dtype, model)
    heads = 1 if model.use_mla else 2 * model.get_num_kv_heads(parallel)
    layers = model.get_num_layers(parallel)
    return int(layers * heads * model.get_head_size() * dtype.itemsize * model.max_model_len)


def configure(vllm_config: Any, engine: PrefillEngine, config: HybridConfig) -> HybridConfig:
    """Give the decoding engine its connector, which carries the prefill engine's settings.

    `config` are the settings of both engines; the decoding engine's own are returned.
    """
    from vllm.config import KVTransferConfig

    # A cache of experts is for decoding: a long prompt reads nearly all of them.
    prefill = config.model_copy(update={"prefill_engine": None, "gpu_expert_cache": (0,)})
    vllm_config.kv_transfer_config = KVTransferConfig(
        kv_connector="PrefillConnector",
        kv_connector_module_path="lvllm.prefill.connector",
        kv_role="kv_consumer",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config={
            "min_tokens": engine.min_tokens,
            "gpu": engine.gpu,
            "prefill": prefill.model_dump(mode="json"),
        },
    )
    scheduler = vllm_config.scheduler_config
    if scheduler.disable_hybrid_kv_cache_manager is None:
        # With a connector vLLM would do the same, and log a line about it.
        scheduler.disable_hybrid_kv_cache_manager = True
    if config.accelerator == "cuda" and engine.gpu is None:
        vllm_config.cache_config.gpu_memory_utilization /= 2
        if not _side_by_side():
            logger.warning(
                "LvLLM: both engines take turns on the GPU, since CUDA's MPS does not run: a token"
                " may wait for a kernel of a prefill. `nvidia-cuda-mps-control -d` before the start"
                " lets them run side by side; LVLLM_PREFILL_ENGINE_GPU gives one another GPU"
            )
    # No batch of the decoding engine is large enough to be worth a staging ring on its GPU.
    return config.model_copy(update={"gpu_prefill_min_batch_size": 0, "gpu_prefetch_window": 0})


def _side_by_side() -> bool:
    """Tell whether the daemon of CUDA's Multi-Process Service runs, by the pipe that it makes."""
    return Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"), "control").exists()


def prefill_configuration(vllm_config: Any, kv_cache_config: Any) -> Any:
    """In the decoding engine: the prefill engine's configuration, made from this engine's own."""
    from vllm.config import CUDAGraphMode, KVTransferConfig
    from vllm.utils import random_uuid

    # The copy is deep, so that changes below stay in it. The layers that this engine has built are
    # reachable from its configuration; they are left out first.
    config = copy.copy(vllm_config)
    config.compilation_config = copy.copy(config.compilation_config)
    config.compilation_config.static_forward_context = {}
    config.compilation_config.static_all_moe_layers = []
    config = copy.deepcopy(config)
    ours = config.kv_transfer_config
    given = ours.kv_connector_extra_config
    config.instance_id = random_uuid()[:5]
    config.additional_config[RESOLVED] = given["prefill"]
    config.kv_transfer_config = KVTransferConfig(
        kv_connector=ours.kv_connector,
        kv_connector_module_path=ours.kv_connector_module_path,
        kv_role="kv_producer",
        kv_connector_extra_config={"decoding_process": os.getpid(), "gpu": given["gpu"]},
    )
    config.speculative_config = config.lora_config = config.kv_events_config = None
    config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE  # Graphs are for decoding.
    group = kv_cache_config.kv_cache_groups[0].kv_cache_spec
    blocks = ceil_div(config.model_config.max_model_len, group.block_size) + SPARE_BLOCKS
    block_bytes = kv_cache_config.kv_cache_tensors[0].size // kv_cache_config.num_blocks
    config.cache_config.kv_cache_memory_bytes = blocks * block_bytes
    config.cache_config.num_gpu_blocks = None
    config.cache_config.num_gpu_blocks_override = None
    return config
