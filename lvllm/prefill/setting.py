"""In the front process: whether there is to be a prefill engine, and what both engines are told."""

from collections.abc import Mapping
from typing import Any

from lvllm.settings.configuration import HybridConfig, PrefillEngine
from lvllm.settings.resolving import Setting

__all__ = ["check", "kv_bytes_of_a_prompt", "prepare"]

MIN_TOKENS = 512
"""Of a long prompt, where nothing else says what is long. Handing one over costs a step of the
decoding engine, in which it computes the prompt's last token, and some milliseconds of copying.
"""
WITHOUT_CACHE = ("ngram", "suffix")
"""Ways of drafting that have no keys and values of their own."""


def check(
    settings: Mapping[str, Setting], accelerator: str, vllm_config: Any
) -> PrefillEngine | None:
    """LVLLM_PREFILL_ENGINE for this model; None: there is one engine.

    Raises SettingError for a model or another setting that the hand-over cannot serve.
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
    """What of this configuration cannot be handed over."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    speculative = vllm_config.speculative_config
    ranks = parallel.world_size * parallel.data_parallel_size
    method = speculative.method if speculative else WITHOUT_CACHE[0]
    reasons = {
        f"{model.model} has no routed experts to share": not model.get_num_experts(),
        f"{model.model} does not generate": model.runner_type != "generate",
        f"{model.model} has layers whose state is not keys and values by token": model.is_hybrid
        or model.has_inner_state
        or model.is_attention_free
        or model.is_encoder_decoder,
        f"an engine of {ranks} workers hands nothing over yet": ranks > 1,
        f"the draft of method {method!r} has keys and values of its own": method
        not in WITHOUT_CACHE,
        "kv-transfer-config names a connector already": vllm_config.kv_transfer_config is not None,
        "enable-sleep-mode=True would end one engine's sleep alone": model.enable_sleep_mode,
    }
    return next((reason for reason, given in reasons.items() if given), None)


def kv_bytes_of_a_prompt(vllm_config: Any) -> int:
    """Of the largest one, as the model's configuration has it: what the prefill engine's cache
    takes, and the memory between the engines at most, each.
    """
    from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype

    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    dtype = kv_cache_dtype_str_to_dtype(vllm_config.cache_config.cache_dtype, model)
    heads = 1 if model.use_mla else 2 * model.get_num_kv_heads(parallel)
    layers = model.get_num_layers(parallel)
    return int(layers * heads * model.get_head_size() * dtype.itemsize * model.max_model_len)


def prepare(vllm_config: Any, engine: PrefillEngine, config: HybridConfig) -> HybridConfig:
    """Give the decoding engine its connector, and with that the prefill engine's settings; return
    its own. `config` is both engines'.
    """
    from vllm.config import KVTransferConfig

    prefill = config.model_copy(update={"prefill_engine": None})
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
        scheduler.disable_hybrid_kv_cache_manager = True  # vLLM would, with a line about it
    if config.accelerator == "cuda" and engine.gpu is None:
        vllm_config.cache_config.gpu_memory_utilization /= 2
    # No batch of the decoding engine is large enough to be worth buffers on its GPU.
    return config.model_copy(update={"gpu_prefill_min_batch_size": 0, "gpu_prefetch_window": 0})
