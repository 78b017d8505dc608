"""The settings in force: environment over YAML over defaults, checked against the model.

`resolve` needs only the two sources and is what `lvllm env` prints. `HybridConfig.of` also
needs vLLM's configuration; it runs once, in the front process, before any weight is read, and
the result travels to the workers inside `additional_config`.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict

from lvllm.checkpoint.moe_layers import moe_layers
from lvllm.engine import weight_formats
from lvllm.formats import declared
from lvllm.machine import cpus, memory_plan
from lvllm.prefill import setting
from lvllm.prefill.setting import PrefillEngine
from lvllm.settings import gpu_checks, variables
from lvllm.settings.gpu_checks import Accelerator
from lvllm.settings.variables import SettingError, ThreadBinding, UseWeight

# Where the front process leaves the resolved settings for the workers.
RESOLVED = "lvllm_resolved"
SECTION = "additional_config.lvllm"
CPU_WORKER = "vllm.v1.worker.cpu_worker.CPUWorker"
GPU_WORKER = "vllm.v1.worker.gpu_worker.Worker"
QUANTIZATIONS = (
    "fp8",
    "compressed-tensors",
    "modelopt",
    "modelopt_fp4",
    "awq",
    "auto_awq",
    "gptq",
    "auto_gptq",
    "inc",
    "gpt_oss_mxfp4",
)
"""vLLM's names of the checkpoints that `lvllm.formats` reads."""
SHAREABLE = ("auto", "hf", "safetensors", "mistral")
"""Load formats whose experts engines can share: those that pass through a parameter's loader."""


@dataclass(frozen=True)
class Setting:
    """A resolved value; `written` and `source` are the text and the place it came from."""

    variable: variables.Variable
    value: Any
    source: str
    written: object = None

    def refuse(self, reason: str) -> SettingError:
        """An error about this setting: one line with its name, its value and `reason`."""
        where = f"{SECTION}.{self.variable.key}" if self.source == "config" else self.variable.name
        return SettingError(f"{where}={str(self.written)!r}: {reason}")


def resolve(environ: Mapping[str, str], section: object) -> dict[str, Setting]:
    """Every setting by key, from the environment and the `additional_config.lvllm` section.

    Raises SettingError for an unknown name or a value that is not allowed.
    """
    variables.check_names(environ)
    if section is None:
        section = {}
    if not isinstance(section, Mapping):
        raise SettingError(f"{SECTION}={section!r} is not allowed: a mapping")
    for key in section:
        if key not in variables.BY_KEY or key in variables.ENVIRONMENT_ONLY:
            hint = variables.suggest(str(key), set(variables.BY_KEY) - variables.ENVIRONMENT_ONLY)
            if key in variables.ENVIRONMENT_ONLY:
                hint = f"only the variable {variables.BY_KEY[key].name} sets it"
            raise SettingError(f"{SECTION}.{key} is not a setting: {hint}")
    settings = {}
    for key, variable in variables.BY_KEY.items():
        sources = (
            ("environment", environ.get(variable.name), variable.name),
            ("config", section.get(key), f"{SECTION}.{key}"),
        )
        settings[key] = Setting(variable, variable.default, "default")
        for source, written, where in reversed(sources):  # the first of them wins
            value = variables.parse(variable, written, where)
            if not variables.is_unset(written):
                settings[key] = Setting(variable, value, source, written)
    return settings


class HybridConfig(BaseModel):
    """What a worker needs to know; every value is final."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    thread_binding: ThreadBinding
    power_saving: bool
    # What the experts are computed in, and on which device a conversion to it is done.
    use_weight: UseWeight
    quantize_on: str
    # What the setting LK_ACTIVATION_BITS says; None: each format's default.
    activation_bits: int | None
    # Logical CPUs of each rank of this host, for the engine and for PyTorch.
    engine_cpus: tuple[tuple[int, ...], ...]
    omp_cpus: tuple[tuple[int, ...], ...]
    # Whether experts lie on all NUMA nodes in turns, since those that compute them have no room.
    numa_interleave: bool
    # What runs all but the experts on the CPU; with "none", all is there, and the rest unused.
    accelerator: Accelerator
    # Layers of the model's own numbering that keep vLLM's own path.
    gpu_resident_moe_layers: tuple[int, ...]
    # Layers copied ahead of the one computed, for batches of at least so many tokens (0: none).
    # "auto": the workers measure.
    gpu_prefetch_window: int
    gpu_prefill_min_batch_size: int | Literal["auto"]
    # A copy or a host callback may take so long; 0: any time.
    watchdog_seconds: int
    # The name under which engines of this host find each other's experts; None: they do not.
    shared_experts: str | None
    # Which prompts another engine prefills, and where; None: this one does.
    prefill_engine: PrefillEngine | None

    @classmethod
    def of(
        cls,
        vllm_config: Any,
        machine: cpus.Machine,
        distance: Callable[[int, cpus.Machine], int] | None = None,
    ) -> "HybridConfig":
        """Resolve and check the settings for this model on this `machine`.

        `distance` says how far a local rank's GPU is from a part of the machine.

        Raises SettingError for a setting that the model, the machine or this version of LvLLM
        cannot honour.
        """
        from lvllm import sharing

        section = vllm_config.additional_config.get("lvllm")
        settings = resolve(os.environ, section)
        accelerator = gpu_checks.accelerator(settings["accelerator"])
        _check_model(vllm_config, accelerator)
        _check_features(vllm_config, accelerator)
        gpu_checks.check(settings, accelerator, vllm_config)
        _check_weights(settings, accelerator, vllm_config)
        prefill = setting.check(settings, accelerator, vllm_config)
        shared = _shared_name(settings, vllm_config)
        parallel = vllm_config.parallel_config
        ranks = parallel.local_world_size * _replicas_here(parallel)
        shares = cpus.divide(machine, ranks)
        if distance is not None:
            shares = cpus.assign(shares, distance)
        limit = min(cpus.logical_cpus(share) for share in shares)

        def count(key: str, default: int) -> int:
            setting = settings[key]
            if setting.value is not None and setting.value > limit:
                raise setting.refuse(
                    f"each of the {ranks} ranks of this host has {limit} logical CPUs;"
                    f" allowed is 1 to {limit}"
                )
            return setting.value or default

        lk_threads = count("lk_threads", min(limit, cpus.default_threads(machine, ranks)))
        omp_threads = count("omp_num_threads", lk_threads)
        engine_cpus = tuple(tuple(cpus.choose(share, lk_threads)) for share in shares)
        omp_cpus = tuple(tuple(cpus.choose(share, omp_threads)) for share in shares)
        return cls(
            thread_binding=settings["lk_thread_binding"].value,
            power_saving=settings["lk_power_saving"].value,
            use_weight=settings["moe_use_weight"].value or UseWeight.KEEP,
            quantize_on="cuda" if settings["moe_quant_on_gpu"].value else "cpu",
            activation_bits=settings["lk_activation_bits"].value,
            engine_cpus=engine_cpus,
            omp_cpus=omp_cpus,
            numa_interleave=memory_plan.check(
                vllm_config,
                settings["moe_use_weight"].value,
                settings["enable_numa_interleave"].value,
                engine_cpus,
                omp_cpus,
                accelerator,
                settings["gpu_resident_moe_layers"].value,
                held=shared is not None and sharing.held(shared),
                prefill_kv_cache=setting.kv_bytes_of_a_prompt(vllm_config) if prefill else None,
            ),
            accelerator=accelerator,
            gpu_resident_moe_layers=settings["gpu_resident_moe_layers"].value,
            gpu_prefetch_window=settings["gpu_prefetch_window"].value,
            gpu_prefill_min_batch_size=settings["gpu_prefill_min_batch_size"].value,
            watchdog_seconds=settings["watchdog_seconds"].value,
            shared_experts=shared,
            prefill_engine=prefill,
        )

    @classmethod
    def current(cls) -> "HybridConfig":
        """The settings of the engine that is being built in this process."""
        from vllm.config import get_current_vllm_config

        return cls.carried(get_current_vllm_config())

    @classmethod
    def carried(cls, vllm_config: Any) -> "HybridConfig":
        """What the front process has left in an engine's configuration."""
        return cls.model_validate(vllm_config.additional_config[RESOLVED])


def _check_model(vllm_config: Any, accelerator: Accelerator) -> None:
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    if not _is_moe(model):
        return
    dtype = str(model.dtype).removeprefix("torch.")
    if dtype not in ("bfloat16", "float16"):
        raise SettingError(
            f"dtype={dtype!r} is not allowed with LVLLM_MOE_NUMA_ENABLED=1: bfloat16 or float16"
        )
    if model.quantization not in (None, *QUANTIZATIONS):
        raise SettingError(
            f"quantization={model.quantization!r} of {model.model} is not supported by"
            " LVLLM_MOE_NUMA_ENABLED=1 yet: allowed are unquantised bfloat16 and float16"
            f" checkpoints, and {', '.join(QUANTIZATIONS)}"
        )
    if parallel.worker_cls != (GPU_WORKER if accelerator == "cuda" else CPU_WORKER):
        raise SettingError(
            f"worker-cls={parallel.worker_cls!r} is not allowed with LVLLM_MOE_NUMA_ENABLED=1:"
            " LvLLM has its own; leave it out"
        )
    if (scheduler := vllm_config.scheduler_config.scheduler_cls) is not None:
        raise SettingError(
            f"scheduler-cls={scheduler!r} is not allowed with LVLLM_MOE_NUMA_ENABLED=1: it would"
            " not end requests whose experts fail; leave it out"
        )
    if parallel.enable_eplb:
        raise SettingError(
            "enable-eplb=True is not allowed with LVLLM_MOE_NUMA_ENABLED=1: experts on the CPU"
            " are placed once; set it to false"
        )


def _check_features(vllm_config: Any, accelerator: Accelerator) -> None:
    """What of vLLM's own features does not work with experts on the CPU."""
    lora = vllm_config.lora_config
    targets = (lora and lora.target_modules) or ()
    experts = [name for name in targets if "experts" in name.split(".")]
    if experts and _is_moe(vllm_config.model_config):
        raise SettingError(
            f"lora-target-modules={experts[0]!r} is not allowed with LVLLM_MOE_NUMA_ENABLED=1: LoRA"
            " is supported on all modules but the routed experts; leave it out"
        )
    speculative = vllm_config.speculative_config
    if accelerator != "cuda" and speculative and speculative.method == "ngram_gpu":
        raise SettingError(
            "speculative-config method='ngram_gpu' is not allowed on vLLM's CPU platform, which has"
            " no pinned memory: take ngram"
        )


def _replicas_here(parallel: Any) -> int:
    """Data-parallel replicas on this host."""
    if parallel.data_parallel_rank_local is None:
        return max(1, int(parallel.data_parallel_size_local))
    # Started one by one, by VLLM_DP_RANK: as many as there can be from this host's first one on.
    first = parallel.data_parallel_rank - parallel.data_parallel_rank_local
    return int(parallel.data_parallel_size - first)


def _is_moe(model: Any) -> bool:
    return bool(model.get_num_experts())


def _shared_name(settings: Mapping[str, Setting], vllm_config: Any) -> str | None:
    model, share = vllm_config.model_config, settings["share_experts"]
    alone = not share.value  # with this server's own second engine, if there is one
    if alone:
        share = settings["prefill_engine"]
    if not share.value or not _is_moe(model):
        return None
    if (load_format := vllm_config.load_config.load_format) not in SHAREABLE:
        raise share.refuse(
            f"it needs load-format {', '.join(SHAREABLE)}, not {load_format!r}; allowed is 0"
        )
    from lvllm import sharing

    folder = memory_plan.folder_of(model.model, model.revision)
    use = settings["moe_use_weight"].value or UseWeight.KEEP
    resident = settings["gpu_resident_moe_layers"].value
    name = sharing.name_of(vllm_config, folder, use.value, resident)
    return f"{name}/{os.getpid()}" if alone else name


def _check_weights(
    settings: Mapping[str, Setting], accelerator: Accelerator, vllm_config: Any
) -> None:
    model = vllm_config.model_config
    wanted, on_gpu = settings["moe_use_weight"], settings["moe_quant_on_gpu"]
    quantization = model.model_arch_config.quantization_config
    if wanted.value == UseWeight.INT4 and _is_moe(model) and quantization is not None:
        layers = moe_layers(model.hf_text_config)
        if declared.only_4_bit(quantization, layers, weight_formats.GROUP_SIZES):
            raise wanted.refuse(
                f"the experts of {model.model} are stored in 4 bits already; allowed is KEEP or"
                " TO_DTYPE"
            )
    if on_gpu.value:
        if wanted.value != UseWeight.INT4:
            raise on_gpu.refuse(
                "it does the arithmetic of LVLLM_MOE_USE_WEIGHT=INT4, which is not set; allowed is"
                " 0"
            )
        # Asked in a process that forks its workers, CUDA would not start in them.
        if accelerator != "cuda" and not torch.cuda.is_available():
            raise on_gpu.refuse("there is no GPU; allowed is 0")
