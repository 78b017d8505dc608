"""Check the settings of GPU offload against vLLM's platform, the model and each other."""

from collections.abc import Mapping
from typing import Any

from lvllm.checkpoint.moe_layers import moe_layers
from lvllm.settings.configuration import Accelerator
from lvllm.settings.resolving import Setting
from lvllm.settings.variables import SettingError
from lvllm.units import ranges

__all__ = ["accelerator", "check"]


def accelerator(setting: Setting) -> Accelerator:
    """The value of LVLLM_ACCELERATOR, or its default on vLLM's platform.

    Raises SettingError for an accelerator that does not belong to the platform.
    """
    from vllm.platforms import current_platform

    allowed: tuple[Accelerator, ...]
    if current_platform.is_cpu():
        platform, allowed = "CPU", ("none", "host")
    elif current_platform.is_cuda():
        platform, allowed = "CUDA", ("cuda",)
    else:
        raise SettingError(
            f"LVLLM_MOE_NUMA_ENABLED=1 on {current_platform.device_name}: it is for vLLM's CPU and"
            " CUDA platforms; unset it for stock vLLM"
        )
    if setting.value is None:
        return allowed[0]
    if setting.value not in allowed:
        raise setting.refuse(f"on vLLM's {platform} platform allowed is {' or '.join(allowed)}")
    chosen: Accelerator = setting.value
    return chosen


def check(settings: Mapping[str, Setting], accelerator: Accelerator, vllm_config: Any) -> None:
    """Raise SettingError for a setting of GPU offload that is impossible or without effect here."""
    model = vllm_config.model_config
    layers: list[int] = []
    if model.get_num_experts():
        layers = moe_layers(model.hf_text_config)
    resident, window = settings["gpu_resident_moe_layers"], settings["gpu_prefetch_window"]
    threshold, call = settings["gpu_prefill_min_batch_size"], settings["gpu_call"]
    cache = settings["gpu_expert_cache"]
    defer = settings["defer_experts"]
    known = [*layers, *_draft_layers(vllm_config)]
    if unknown := [layer for layer in resident.value if layer not in known]:
        raise resident.refuse(
            f"layer {unknown[0]} of {model.model} has no routed experts; those that have are"
            f" {ranges(known) or 'none'}"
        )
    most = vllm_config.scheduler_config.max_num_batched_tokens
    if threshold.value != "auto" and threshold.value > most:
        raise threshold.refuse(f"more than max_num_batched_tokens; allowed is 0 to {most}")
    for setting, given, allowed in (
        (resident, resident.value, "empty"),
        (window, window.value, "0 or empty"),
        (threshold, threshold.value, "0 or empty"),
        (call, call.value != "hostfunc", "hostfunc or empty"),
        (cache, any(cache.value), "0 or empty"),
        (defer, defer.value, "0 or empty"),
    ):
        if given and accelerator == "none":
            raise setting.refuse(
                f"all experts run on the CPU, as LVLLM_ACCELERATOR is none; allowed is {allowed}"
            )
        if given and not layers:
            raise setting.refuse(f"{model.model} has no routed experts; allowed is {allowed}")
    if any(cache.value) and not set(layers) - set(resident.value):
        raise cache.refuse(
            f"it is for layers that are not resident, and {resident.variable.name} names all;"
            " allowed is 0 or empty"
        )
    staging = settings["gpu_staging_mib"]
    for setting, given, allowed in (
        (window, window.value, "0 or empty"),
        (staging, staging.source != "default", "empty"),
    ):
        if given and not threshold.value:
            raise setting.refuse(
                f"it is for batches of {threshold.variable.name} tokens or more, which is 0;"
                f" allowed is {allowed}"
            )
    if defer.value:
        _check_deferral(defer, len(set(layers) - set(resident.value)), vllm_config)
    if accelerator == "cuda" and layers:
        _check_omp(settings["omp_num_threads"])
        _check_cuda(vllm_config)


def check_cache(cache: Setting, ranks: int, vllm_config: Any) -> None:
    """Raise SettingError unless the sizes of the caches suit the ranks and the KV cache."""
    if len(cache.value) not in (1, ranks):
        raise cache.refuse(
            f"it has {len(cache.value)} sizes; allowed is one for all GPUs, or one for each of the"
            f" {ranks} ranks of this host"
        )
    if "auto" in cache.value and vllm_config.cache_config.kv_cache_memory_bytes:
        raise cache.refuse(
            "the size of the KV cache is set, so vLLM measures no memory; allowed is a number of"
            " GiB"
        )


def _draft_layers(vllm_config: Any) -> list[int]:
    """The numbers of the layers for multi-token prediction, if they are used.

    These layers follow the model's own. They are resident whether or not
    LVLLM_GPU_RESIDENT_MOE_LAYERS names them.
    """
    speculative = vllm_config.speculative_config
    if speculative is None or speculative.method != "mtp":
        return []
    count = getattr(speculative.draft_model_config.hf_config, "n_predict", None) or 0
    first = vllm_config.model_config.hf_text_config.num_hidden_layers
    return list(range(first, first + count))


def _check_deferral(defer: Setting, on_cpu: int, vllm_config: Any) -> None:
    """Refuse to defer experts where a token has too few, or with `on_cpu` layers on the CPU."""
    model = vllm_config.model_config
    # It is 0 if config.json calls it by a name that vLLM does not know. The engine then defers all
    # experts of a token but one at most.
    if (topk := model.get_num_experts_per_tok()) and defer.value >= topk:
        raise defer.refuse(
            f"a token of {model.model} takes {topk} experts, and one of them is not deferred;"
            f" allowed is 0 to {topk - 1}"
        )
    if vllm_config.parallel_config.enable_expert_parallel:
        raise defer.refuse(
            "with enable-expert-parallel no rank knows all experts of a token, and which of them"
            " weigh least; allowed is 0"
        )
    if on_cpu < 2:
        raise defer.refuse(
            f"experts are added one layer on the CPU later, and there are {on_cpu} such layers;"
            " allowed is 0"
        )


def _check_omp(setting: Setting) -> None:
    if setting.source == "config":
        raise setting.refuse(
            "on vLLM's CUDA platform only the variable OMP_NUM_THREADS sets it; leave it out"
        )


def _check_cuda(vllm_config: Any) -> None:
    """Refuse features of vLLM that cannot work with experts on the CPU and the rest on a GPU."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    offload = vllm_config.offload_config
    one_batch = "lk computes one batch at a time"
    one_server = "each of several servers would give all CPUs to its own ranks"
    one_mover = "weights are moved by LvLLM"
    for name, value, allowed, reason in (
        ("enable-dbo", parallel.enable_dbo, False, one_batch),
        ("ubatch-size", parallel.ubatch_size, 0, one_batch),
        # The other backends pass tokens directly to kernels on the GPU.
        (
            "all2all-backend",
            parallel.all2all_backend,
            "allgather_reducescatter",
            "only that backend passes all tokens of a rank's experts to lk",
        ),
        (
            "prefill-context-parallel-size",
            parallel.prefill_context_parallel_size,
            1,
            "vLLM would not bring a prompt's tokens together for lk",
        ),
        ("data-parallel-backend", parallel.data_parallel_backend, "mp", one_server),
        ("data-parallel-external-lb", parallel.data_parallel_external_lb, False, one_server),
        ("data-parallel-hybrid-lb", parallel.data_parallel_hybrid_lb, False, one_server),
        ("cpu-offload-gb", offload.uva.cpu_offload_gb, 0, one_mover),
        ("offload-group-size", offload.prefetch.offload_group_size, 0, one_mover),
        ("enable-sleep-mode", model.enable_sleep_mode, False, "lk's memory stays in use"),
    ):
        if value != allowed:
            raise SettingError(
                f"{name}={value!r} is not allowed with LVLLM_MOE_NUMA_ENABLED=1 on vLLM's CUDA"
                f" platform: {reason}; allowed is {allowed}"
            )
