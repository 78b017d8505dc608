"""Check vLLM's configuration for anything that experts on the CPU cannot serve.

This happens before weights are read. Each check raises SettingError in one line that names the
setting, its value and what is allowed.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lvllm import formats
from lvllm.checkpoint import Checkpoint, CheckpointError
from lvllm.checkpoint.model_files import CONFIG, config_of
from lvllm.checkpoint.moe_layers import moe_layers
from lvllm.errors import quoted
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
    "check_without_experts",
    "dense_weight",
    "is_moe",
]

CPU_WORKER = "vllm.v1.worker.cpu_worker.CPUWorker"
GPU_WORKER = "vllm.v1.worker.gpu_worker.Worker"
V3_ROUTING = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
LONGCAT = {"zero_expert_type": "identity", "mla_scale_q_lora": True, "mla_scale_kv_lora": True}
UNWRITTEN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("deepseek_v3", "deepseek_v32", "kimi_k2"), V3_ROUTING),
    "longcat_flash": LONGCAT,
}
"""What published checkpoints have in config.json, transformers does not write, and vLLM needs."""
ENABLED = "LVLLM_MOE_NUMA_ENABLED=1"
EXPERTS = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")
TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_top_k",
    "moe_k",
)
_OF_EXPERTS = re.compile(r"\.(experts|block_sparse_moe)\.")
"""Part of the name of a tensor of experts, in all families."""


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
    _check_top_k(model)
    _check_purpose(model)
    _check_unwritten(model)
    _check_zero_experts(model, parallel)
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


def check_without_experts(model: Any) -> None:
    """Refuse a model that has no experts by its config.json, and has weights of experts.

    Some families have models without experts, whose config.json says 0 or null. vLLM would build
    such a model, and end in any error when the weights of the experts come.

    Raises CheckpointError.
    """
    folder, said = Path(model.model), _written(model, EXPERTS)
    key = next((key for key, value in said.items() if not value), None)
    if key is None or not folder.is_dir():
        return
    try:
        tensors = Checkpoint.open(folder).tensors
    except CheckpointError:
        return  # What LvLLM leaves to vLLM may be in other files.
    found = next((name for name in tensors if _OF_EXPERTS.search(name)), None)
    if found is not None:
        wanted = f"from 1 is wanted, since the files have weights of experts: {found!r}"
        raise _refuse_number(model, key, said[key], wanted)


def _check_top_k(model: Any) -> None:
    """Refuse a number of experts for each token that is none, or more than there are.

    A model that says it in a way of its own is checked when its layers are built.
    """
    said = _written(model, TOP_K)
    # LongCat-Flash chooses among experts that compute nothing, too.
    experts = model.get_num_experts() + (getattr(model.hf_text_config, "zero_expert_num", 0) or 0)
    for value in said.values():
        # Some models have a number for each layer.
        chosen = max(value, default=None) if isinstance(value, list) else value
        if chosen is not None and 1 <= chosen <= experts:
            return
    if said:
        key, value = next(iter(said.items()))
        wanted = f"from 1 to {experts} is wanted, as the model has {experts} experts"
        raise _refuse_number(model, key, value, wanted)


def _check_purpose(model: Any) -> None:
    """Refuse a config.json without `architectures`, with which vLLM would answer no prompt.

    It takes the class of the model's type then, which has no head, and makes embeddings of it.
    """
    written, overrides = _config(model), model.hf_overrides
    if (
        not written
        or written.get("architectures")
        or (isinstance(overrides, dict) and overrides.get("architectures"))
        or (model.runner, model.runner_type) != ("auto", "pooling")
    ):
        return
    raise CheckpointError(
        f"{_config_file(model)}: has no architectures: a list with the name of the model's class is"
        f" wanted, since vLLM would take {model.architectures[0]}, which makes embeddings;"
        " --runner pooling serves those"
    )


def _written(model: Any, names: Sequence[str]) -> dict[str, Any]:
    """The values of those `names` that the model has; those in its config.json come first.

    transformers has other names for some of them, and fills in what is left out.
    """
    config, written = model.hf_text_config, _config(model)
    text = written.get("text_config") or {}
    known = [name for name in names if hasattr(config, name)]
    known.sort(key=lambda name: name not in written and name not in text)
    return {name: getattr(config, name) for name in known}


def _refuse_number(model: Any, key: str, value: Any, wanted: str) -> CheckpointError:
    return CheckpointError(
        f"{_config_file(model)}: {key}={quoted(value)} is not allowed: a whole number {wanted}"
    )


def _config(model: Any) -> dict[str, Any]:
    """What a config.json in a local folder says, which has been checked; {} without one."""
    file = _config_file(model)
    return config_of(file.parent) if file.is_file() else {}


def _config_file(model: Any) -> Path:
    return Path(model.hf_config_path or model.model) / CONFIG


def _check_unwritten(model: Any) -> None:
    """Refuse a config.json that lacks what vLLM cannot run the model without.

    A DeepSeek-V3 would be routed as in DeepSeek-V2, and LongCat-Flash would end in a traceback.
    """
    config = model.hf_text_config
    wanted = UNWRITTEN.get(config.model_type, {})
    missing = {
        key: value for key, value in wanted.items() if getattr(config, key, None) in (None, "")
    }
    if missing:
        raise SettingError(
            f"{model.model}: config.json of a {config.model_type} lacks {' and '.join(missing)},"
            " which transformers does not write, and without which vLLM computes otherwise or"
            f" stops: add {json.dumps(missing)[1:-1]} to it, or the same to hf-overrides"
        )


def _check_zero_experts(model: Any, parallel: Any) -> None:
    """Refuse what vLLM cannot do with experts that have no weights."""
    config = model.hf_text_config
    if not getattr(config, "zero_expert_num", None):
        return
    if (kind := getattr(config, "zero_expert_type", None)) != "identity":
        raise SettingError(
            f"{model.model}: zero_expert_type={kind!r} in config.json is not supported: identity"
        )
    if parallel.data_parallel_size > 1:
        # vLLM would add what they give for the tokens of all replicas to the tokens of one.
        raise SettingError(
            f"data-parallel-size={parallel.data_parallel_size} is not allowed for {model.model},"
            " whose zero-computation experts vLLM cannot divide among replicas: 1"
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
