"""Check vLLM's configuration for anything that experts on the CPU cannot serve.

This happens before weights are read. Each check raises SettingError in one line that names the
setting, its value and what is allowed.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch

from lvllm import formats
from lvllm.checkpoint.moe_layers import moe_layers
from lvllm.settings import online
from lvllm.settings.configuration import Accelerator
from lvllm.settings.division import check_rows
from lvllm.settings.resolving import Setting
from lvllm.settings.use_weight import UseWeight
from lvllm.settings.variables import DenseWeight, SettingError

__all__ = [
    "CPU_WORKER",
    "GPU_WORKER",
    "check_features",
    "check_model",
    "check_weights",
    "dense_weight",
    "is_moe",
]

CPU_WORKER = "vllm.v1.worker.cpu_worker.CPUWorker"
GPU_WORKER = "vllm.v1.worker.gpu_worker.Worker"
V3_TYPES = ("deepseek_v3", "deepseek_v32", "kimi_k2")
V3_ROUTING = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
"""What published DeepSeek-V3, V3.2 and Kimi-K2 have in config.json."""
ENABLED = "LVLLM_MOE_NUMA_ENABLED=1"


def is_moe(model: Any) -> bool:
    """Whether vLLM's configuration of a model says that it has routed experts."""
    return bool(model.get_num_experts())


def check_model(vllm_config: Any, accelerator: Accelerator) -> None:
    """Check the model, and the workers and scheduler that are to run it."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    if not is_moe(model):
        return
    dtype = str(model.dtype).removeprefix("torch.")
    if dtype not in ("bfloat16", "float16"):
        raise SettingError(f"dtype={dtype!r} is not allowed with {ENABLED}: bfloat16 or float16")
    online.check_linear_layers(vllm_config, accelerator)
    if model.quantization not in (None, *formats.QUANTIZATIONS) and not online.is_all(vllm_config):
        raise SettingError(
            f"quantization={model.quantization!r} of {model.model} is not supported by"
            f" {ENABLED} yet: allowed are unquantised bfloat16 and float16"
            f" checkpoints, and {', '.join(formats.QUANTIZATIONS)}"
        )
    _check_routing(model)
    zero_experts = getattr(model.hf_text_config, "zero_expert_num", None)
    if zero_experts and accelerator != "cuda":
        raise SettingError(
            f"{model.model} has {zero_experts} zero-computation experts, which vLLM routes and"
            " computes on GPUs only (LongCat-Flash)"
        )
    if parallel.worker_cls != (GPU_WORKER if accelerator == "cuda" else CPU_WORKER):
        raise SettingError(
            f"worker-cls={parallel.worker_cls!r} is not allowed with {ENABLED}:"
            " LvLLM has its own; leave it out"
        )
    if (scheduler := vllm_config.scheduler_config.scheduler_cls) is not None:
        raise SettingError(
            f"scheduler-cls={scheduler!r} is not allowed with {ENABLED}: it would"
            " not end requests whose experts fail; leave it out"
        )
    if parallel.enable_eplb:
        raise SettingError(
            f"enable-eplb=True is not allowed with {ENABLED}: experts on the CPU"
            " are placed once; set it to false"
        )
    check_rows(model, parallel)


def _check_routing(model: Any) -> None:
    """Refuse a DeepSeek-V3 whose config.json does not say how it routes.

    transformers does not write it, and vLLM would route as in DeepSeek-V2.
    """
    config = model.hf_text_config
    if config.model_type not in V3_TYPES:
        return
    missing = {key: value for key, value in V3_ROUTING.items() if not getattr(config, key, None)}
    if missing:
        raise SettingError(
            f"{model.model}: config.json of a {config.model_type} lacks {' and '.join(missing)},"
            " which transformers does not write, and without which vLLM routes otherwise: add"
            f" {json.dumps(missing)[1:-1]} to it, or the same to hf-overrides"
        )


def check_features(vllm_config: Any, accelerator: Accelerator) -> None:
    """Refuse features of vLLM that need the experts on a GPU, or that need a GPU at all."""
    lora = vllm_config.lora_config
    targets = (lora and lora.target_modules) or ()
    experts = [name for name in targets if "experts" in name.split(".")]
    if experts and is_moe(vllm_config.model_config):
        raise SettingError(
            f"lora-target-modules={experts[0]!r} is not allowed with {ENABLED}: LoRA"
            " is supported on all modules but the routed experts; leave it out"
        )
    speculative = vllm_config.speculative_config
    if accelerator != "cuda" and speculative and speculative.method == "ngram_gpu":
        raise SettingError(
            "speculative-config method='ngram_gpu' is not allowed on vLLM's CPU platform, which has"
            " no pinned memory: take ngram"
        )


def dense_weight(setting: Setting, accelerator: Accelerator, model: Any) -> DenseWeight | None:
    """The number format of linear layers on the engine; None if vLLM multiplies them.

    Raises SettingError for a format that nobody would honour.
    """
    if accelerator != "cuda" and is_moe(model):
        return setting.value or DenseWeight.KEEP
    if setting.value == DenseWeight.INT8:
        why = (
            "linear layers run on the GPU"
            if accelerator == "cuda"
            else f"{model.model} has no routed experts"
        )
        raise setting.refuse(f"{why}; allowed is KEEP")
    return None


def check_weights(
    settings: Mapping[str, Setting], accelerator: Accelerator, vllm_config: Any
) -> None:
    """Check LVLLM_MOE_USE_WEIGHT and LVLLM_MOE_QUANT_ON_GPU for this model on this machine."""
    model = vllm_config.model_config
    wanted, on_gpu = settings["moe_use_weight"], settings["moe_quant_on_gpu"]
    quantization = model.model_arch_config.quantization_config
    used = {rule.value for rule in wanted.value or ()}
    int4 = UseWeight.INT4 in used
    if int4 and is_moe(model) and quantization is not None:
        layers = moe_layers(model.hf_text_config)
        if formats.only_4_bit(quantization, layers):
            raise wanted.refuse(
                f"the experts of {model.model} are stored in 4 bits already; allowed is KEEP or"
                " TO_DTYPE"
            )
    if on_gpu.value:
        if not used & {UseWeight.INT4, UseWeight.INT8, UseWeight.FP8}:
            raise on_gpu.refuse(
                "it does the arithmetic of LVLLM_MOE_USE_WEIGHT=INT4, INT8 or FP8, none of which is"
                " set; allowed is 0"
            )
        # Once a process has initialised CUDA, the workers that it forks cannot use CUDA. So CUDA is
        # asked only where the workers do not use it.
        if accelerator != "cuda" and not torch.cuda.is_available():
            raise on_gpu.refuse("there is no GPU; allowed is 0")
