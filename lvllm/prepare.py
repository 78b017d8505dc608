"""Check a start in the front process before any weight is read, and configure the workers.

The front process is the one that builds vLLM's configuration and starts the workers. Everything
that may stop a start is checked here: the settings, the model, the checkpoint's headers and the
memory. The result is a `HybridConfig` in vLLM's configuration. Only this module and the plugin
import all other parts of LvLLM.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lvllm import sharing
from lvllm.checkpoint import Checkpoint, CheckpointError, model_files
from lvllm.checkpoint.gguf.architectures import METHOD
from lvllm.checkpoint.gguf.finding import gguf_of
from lvllm.checkpoint.gguf.folder import is_presented, present
from lvllm.errors import LvllmError, quoted
from lvllm.faults import compiled, process, scratch
from lvllm.formats import gguf
from lvllm.handover import banks
from lvllm.log import logger
from lvllm.machine import (
    compiler,
    cpus,
    gpu_distance,
    installation,
    memory_plan,
    rank_network,
    room,
)
from lvllm.machine.facts import limits
from lvllm.machine.memory_need import folder_of
from lvllm.metrics import collector, memory
from lvllm.prefill import configuration as prefill_configuration
from lvllm.settings import gpu_checks, model_checks, online
from lvllm.settings.configuration import RESOLVED, Accelerator, HybridConfig
from lvllm.settings.model_checks import CPU_WORKER, GPU_WORKER, is_moe
from lvllm.settings.resolving import SECTION, Setting, resolve
from lvllm.settings.use_weight import LayerFormats, UseWeight, UseWeights
from lvllm.settings.variables import SettingError

__all__ = [
    "check_compilation",
    "check_files",
    "check_operators",
    "final_settings",
    "prepare",
    "replicas_here",
    "shared_identity",
    "take_gguf",
]

OMP_BIND = "VLLM_CPU_OMP_THREADS_BIND"

SHAREABLE = ("auto", "hf", "safetensors", "mistral", METHOD)
"""The load formats whose experts engines can share, because they use the parameters' loaders."""


def prepare(vllm_config: Any) -> None:
    """Check the settings and the checkpoint, and leave what the workers need in `vllm_config`.

    A model without experts gets nothing, so that vLLM runs it as without LvLLM. Only its settings
    are checked.

    Raises SettingError or CheckpointError.
    """
    if vllm_config.model_config is None or RESOLVED in vllm_config.additional_config:
        return
    if _is_one_of_several_api_servers(vllm_config.parallel_config):
        return  # The parent process has checked everything, and the engines take memory by now.
    if not is_moe(vllm_config.model_config):
        model_checks.check_without_experts(vllm_config.model_config)
        _checked_settings(vllm_config)
        return
    config = final_settings(
        vllm_config, cpus.this_machine(), gpu_distance.of_gpus(), limits.cpu_quota()
    )
    _check_checkpoint(vllm_config)
    _check_sampling(vllm_config.model_config)
    room.check_open_files()
    _check_shared_memory(vllm_config.parallel_config)
    process.prepare()
    compiled.prepare()
    rank_network.choose(vllm_config.parallel_config)
    if (line := installation.shared_files(installation.owners_of_vllm())) is not None:
        logger.warning("LvLLM: %s", line)
    if not _on_ray(vllm_config):
        scratch.prepare()  # Ray would carry the name of the folder to other hosts.
    memory.prepare()
    collector.register()
    if config.prefill_engine is not None:
        config = prefill_configuration.configure(vllm_config, config.prefill_engine, config)
    vllm_config.additional_config[RESOLVED] = config.model_dump(mode="json")
    if config.accelerator != "cuda":
        _prepare_cpu_platform(vllm_config, config)
    elif vllm_config.parallel_config.worker_cls == GPU_WORKER:
        # LvLLM's worker does the same as vLLM's, and raises an error that a callback of lk met.
        vllm_config.parallel_config.worker_cls = "lvllm.worker.gpu.HybridGPUWorker"
        _keep_streamed_batches_out_of_graphs(
            vllm_config.compilation_config, config.gpu_prefill_min_batch_size
        )


def take_gguf(arguments: Any) -> None:
    """Give vLLM's `EngineArgs` a folder that stands for a GGUF file, if they name such a file.

    The model keeps the name that the user gave, unless there is a served-model-name.

    Raises CheckpointError or SettingError.
    """
    named = arguments.model
    file = gguf_of(named)
    if file is None or is_presented(Path(named)):
        return
    for option, value, allowed in (
        ("load-format", arguments.load_format, ("auto", METHOD)),
        ("quantization", arguments.quantization, (None, METHOD)),
    ):
        if value not in allowed:
            raise SettingError(
                f"{option}={value!r} is not allowed with the GGUF file {file}:"
                f" allowed is {METHOD}, or leave it out"
            )
    config = _given_config(arguments.hf_config_path)
    own_tokenizer = arguments.tokenizer is None and not arguments.skip_tokenizer_init
    folder = present(file, tokenizer=own_tokenizer, config=config)
    gguf.check_types(model_files.config_of(folder), str(file))
    arguments.model = str(folder)
    arguments.load_format = METHOD
    arguments.hf_config_path = None
    arguments.served_model_name = arguments.served_model_name or named


def _given_config(path: str | None) -> dict[str, Any] | None:
    """The config.json in the folder of --hf-config-path; None: there is no such option."""
    if path is None:
        return None
    folder = Path(path)
    if not (folder / model_files.CONFIG).is_file():
        raise CheckpointError(f"hf-config-path={path!r}: has no {model_files.CONFIG}")
    model_files.check(folder, [model_files.CONFIG])
    return model_files.config_of(folder)


def check_files(arguments: Any) -> None:
    """Check the local folders that vLLM's `EngineArgs` name, and the small files in them.

    Raises SettingError or CheckpointError.
    """
    _check_folder("model", arguments.model)
    _check_folder("hf-config-path", arguments.hf_config_path, "config.json", "params.json")
    if arguments.generation_config not in ("auto", "vllm"):
        _check_folder(
            "generation-config",
            arguments.generation_config,
            *model_files.GENERATION,
            model_files.CONFIG,
        )
    if arguments.tokenizer_mode != "mistral":
        _check_folder("tokenizer", arguments.tokenizer)
    speculative = arguments.speculative_config
    draft = speculative.get("model") if isinstance(speculative, dict) else None
    _check_folder("speculative-config.model", draft)
    overrides = arguments.hf_overrides
    overridden = overrides.keys() if isinstance(overrides, dict) else ()
    files = {arguments.hf_config_path or arguments.model: [model_files.CONFIG]}
    if arguments.generation_config != "vllm":
        given = arguments.generation_config
        where = arguments.model if given == "auto" else given
        files.setdefault(where, []).extend(model_files.GENERATION)
    if not arguments.skip_tokenizer_init:
        where = arguments.tokenizer or arguments.model
        files.setdefault(where, []).extend(model_files.TOKENIZER)
    if isinstance(draft, str):
        files.setdefault(draft, []).append(model_files.CONFIG)
    for folder, names in files.items():
        if Path(folder).is_dir():
            model_files.check(Path(folder), names, overridden)


def _check_folder(option: str, given: object, *wanted: str) -> None:
    """Raise SettingError if `given` is no folder, or one without any of the `wanted` files.

    A name that is not on this machine is one of the hub, unless it is an absolute path. What is no
    text is left to vLLM.
    """
    if not isinstance(given, str):
        return
    folder = Path(given)
    if not os.path.lexists(folder):
        if folder.is_absolute():
            raise SettingError(f"{option}={quoted(given)}: No such file or directory")
    elif not folder.is_dir():
        raise SettingError(f"{option}={quoted(given)}: is no folder")
    elif wanted and not any((folder / name).is_file() for name in wanted):
        raise SettingError(f"{option}={quoted(given)}: has no {' or '.join(wanted)}")


def check_compilation(arguments: Any) -> None:
    """Turn vLLM's compilation off on a CPU where PyTorch lacks what it needs for that.

    Raises SettingError if the user asked for a compiled mode.
    """
    from vllm.config import CompilationMode
    from vllm.platforms import current_platform

    lacking = compiler.lacking()
    if lacking is None or not current_platform.is_cpu():
        return
    compilation = arguments.compilation_config
    if compilation.mode not in (None, CompilationMode.NONE):
        mode = CompilationMode(compilation.mode).name
        raise SettingError(f"compilation-config.mode={mode}: only NONE is possible here: {lacking}")
    compilation.mode = CompilationMode.NONE
    logger.warning("LvLLM: torch.compile is off, because %s", lacking)


def final_settings(
    vllm_config: Any,
    machine: cpus.Machine,
    distance: Callable[[int, cpus.Machine], int] | None = None,
    quota: float | None = None,
) -> HybridConfig:
    """Resolve and check the settings for this model on this `machine`.

    distance(rank, part) says how far a local rank's GPU is from a part of the machine; None: there
    are no GPUs. `quota` is the number of CPUs whose time the cgroup gets; None: all.

    Raises SettingError for a setting that the model, the machine or this version of LvLLM
    cannot honour.
    """
    settings, accelerator = _checked_settings(vllm_config)
    model_checks.check_model(vllm_config, accelerator)
    model_checks.check_features(vllm_config, accelerator)
    use_weight = _use_weight(settings["moe_use_weight"], vllm_config)
    prefill = prefill_configuration.check(settings, accelerator, vllm_config)
    shared = _shared_name(settings, vllm_config)
    bits = settings["lk_activation_bits"].value
    engine_cpus: CpusOfRanks = ()
    omp_cpus: CpusOfRanks = ()
    # On a Ray cluster without GPUs, each machine divides its own CPUs, and looks at its own memory.
    here = accelerator == "cuda" or not _on_ray(vllm_config)
    if here:
        parallel = vllm_config.parallel_config
        ranks = parallel.local_world_size * replicas_here(parallel)
        engine_cpus, omp_cpus = _divide_cpus(settings, ranks, machine, distance, quota)
    gpu_checks.check_cache(settings["gpu_expert_cache"], len(engine_cpus), vllm_config)
    interleave = settings["enable_numa_interleave"].value
    return HybridConfig(
        thread_binding=settings["lk_thread_binding"].value,
        power_saving=settings["lk_power_saving"].value,
        # Without a GPU, attention runs on the engine's cores between two layers, and engines that
        # share experts share cores as well.
        own_cores=accelerator == "cuda"
        and shared is None
        and cpus.spares_a_core(machine, engine_cpus),
        use_weight=use_weight,
        dense_weight=model_checks.dense_weight(
            settings["dense_weight"], accelerator, vllm_config.model_config
        ),
        quantize_on="cuda" if settings["moe_quant_on_gpu"].value else "cpu",
        activation_bits=None if bits == "auto" else int(bits),
        engine_cpus=engine_cpus,
        omp_cpus=omp_cpus,
        numa_interleave=memory_plan.check(
            vllm_config,
            use_weight,
            interleave,
            engine_cpus,
            omp_cpus,
            accelerator,
            settings["gpu_resident_moe_layers"].value,
            held=shared is not None and sharing.is_taken(shared),
            prefill_kv_cache=prefill_configuration.kv_bytes_of_a_prompt(vllm_config)
            if prefill
            else None,
        )
        if here
        else interleave,
        accelerator=accelerator,
        gpu_resident_moe_layers=settings["gpu_resident_moe_layers"].value,
        gpu_prefetch_window=settings["gpu_prefetch_window"].value,
        gpu_staging_mib=settings["gpu_staging_mib"].value,
        gpu_prefill_min_batch_size=settings["gpu_prefill_min_batch_size"].value,
        gpu_expert_cache=settings["gpu_expert_cache"].value,
        gpu_call=settings["gpu_call"].value,
        defer_experts=settings["defer_experts"].value,
        watchdog_seconds=settings["watchdog_seconds"].value,
        verify=settings["verify"].value,
        metrics_experts=settings["metrics_experts"].value,
        shared_experts=shared,
        bank=os.environ.get(banks.LOADS_FOR),
        prefill_engine=prefill,
    )


def _check_sampling(model: Any) -> None:
    """Raise SettingError for a default sampling parameter that is out of range.

    With it, vLLM refuses each request that does not give a value of its own.
    """
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    if model.runner_type != "generate":
        return
    for name, value in model.get_diff_sampling_param().items():
        fault = "a number is wanted"
        if isinstance(value, int | float) and not isinstance(value, bool):
            try:
                SamplingParams(**{name: value})
                continue
            except (VLLMValidationError, ValueError) as error:
                fault = " ".join(str(error).split())
        given = "max_new_tokens" if name == "max_tokens" else name
        of = model.generation_config
        source = "override-generation-config"
        if given not in model.override_generation_config:
            source = f"{model.model if of == 'auto' else of}: {model_files.GENERATION[0]}"
        raise SettingError(f"{source}: {given}={quoted(value)} is not allowed: {fault}")


def divide_host(vllm_config: Any, ranks: int) -> None:
    """In an actor of Ray: divide this machine's CPUs among the `ranks` of the model on it.

    Raises SettingError.
    """
    config = HybridConfig.carried(vllm_config)
    engine_cpus, omp_cpus = _divide_cpus(
        _settings(vllm_config), ranks, cpus.this_machine(), None, limits.cpu_quota()
    )
    config = config.model_copy(update={"engine_cpus": engine_cpus, "omp_cpus": omp_cpus})
    vllm_config.additional_config[RESOLVED] = config.model_dump(mode="json")


def _on_ray(vllm_config: Any) -> bool:
    return bool(vllm_config.parallel_config.distributed_executor_backend == "ray")


def _settings(vllm_config: Any) -> dict[str, Setting]:
    """The settings from environment and YAML; what vLLM's own options ask for is one, too.

    Raises SettingError.
    """
    settings = resolve(os.environ, vllm_config.additional_config.get(SECTION.rpartition(".")[2]))
    use = settings["moe_use_weight"]
    if use.value is None and is_moe(vllm_config.model_config):
        wanted = online.experts(vllm_config)
        if wanted is not None:
            value = UseWeights.parse(wanted)
            settings["moe_use_weight"] = replace(use, value=value, written=str(wanted))
    return settings


def _checked_settings(vllm_config: Any) -> tuple[Mapping[str, Setting], Accelerator]:
    """The settings from environment and YAML, and where all but the experts runs.

    Raises SettingError for a setting that this model or this platform cannot honour.
    """
    settings = _settings(vllm_config)
    accelerator = gpu_checks.accelerator(settings["accelerator"])
    gpu_checks.check(settings, accelerator, vllm_config)
    model_checks.check_weights(settings, accelerator, vllm_config)
    model_checks.dense_weight(settings["dense_weight"], accelerator, vllm_config.model_config)
    prefill_configuration.check(settings, accelerator, vllm_config)
    return settings, accelerator


def _use_weight(setting: Setting, vllm_config: Any) -> LayerFormats:
    """The number format of each layer's experts. Raises SettingError for a rule without effect."""
    use: UseWeights | None = setting.value
    if use is None or not is_moe(vllm_config.model_config):
        return LayerFormats()
    if use.everywhere is not None:
        return LayerFormats(others=use.everywhere)
    layers = memory_plan.expert_layers(vllm_config)
    if not layers:
        raise setting.refuse(
            "the rules are checked against the names of experts in the model's files, and on this"
            " machine are none: fetch them first, or give one format for all layers"
        )
    if (fault := use.without_effect(layers)) is not None:
        raise setting.refuse(f"{fault}; the layers are {layers[0]} to {layers[-1]}")
    return LayerFormats.by_rules(use, layers)


CpusOfRanks = tuple[tuple[int, ...], ...]


def _divide_cpus(
    settings: Mapping[str, Setting],
    ranks: int,
    machine: cpus.Machine,
    distance: Callable[[int, cpus.Machine], int] | None,
    quota: float | None,
) -> tuple[CpusOfRanks, CpusOfRanks]:
    """The logical CPUs of each rank of this host, for the engine and for PyTorch."""
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

    lk_threads = count("lk_threads", min(limit, cpus.default_threads(machine, ranks, quota)))
    omp_threads = count("omp_num_threads", lk_threads)
    return (
        tuple(tuple(cpus.choose(share, lk_threads)) for share in shares),
        tuple(tuple(cpus.choose(share, omp_threads)) for share in shares),
    )


def replicas_here(parallel: Any) -> int:
    """How many data-parallel replicas run on this host."""
    if parallel.data_parallel_rank_local is None:
        return max(1, int(parallel.data_parallel_size_local))
    # The replicas are started one by one, with VLLM_DP_RANK, so their number on this host is not
    # known. At most it is all replicas from the first one of this host on.
    first = parallel.data_parallel_rank - parallel.data_parallel_rank_local
    return int(parallel.data_parallel_size - first)


def _shared_name(settings: Mapping[str, Setting], vllm_config: Any) -> str | None:
    """The name under which engines share this model's experts; None: they do not share them."""
    model, share = vllm_config.model_config, settings["share_experts"]
    with_own_prefill_engine_only = not share.value
    if with_own_prefill_engine_only:
        share = settings["prefill_engine"]
    if not share.value or not is_moe(model):
        return None
    if (load_format := vllm_config.load_config.load_format) not in SHAREABLE:
        raise share.refuse(
            f"it needs load-format {', '.join(SHAREABLE)}, not {load_format!r}; allowed is 0"
        )
    identity = shared_identity(vllm_config)
    name = sharing.name_of(identity)
    if with_own_prefill_engine_only:
        return f"{name}/{os.getpid()}"
    if os.environ.get(banks.LOADS_FOR) is None:
        _check_banks(share, identity, name)
    return name


def shared_identity(vllm_config: Any) -> dict[str, str]:
    """What engines that share this model's experts must have in common. Raises SettingError."""
    settings, model = _settings(vllm_config), vllm_config.model_config
    folder = folder_of(model.model, model.revision)
    use = settings["moe_use_weight"].value or UseWeight.KEEP
    resident = settings["gpu_resident_moe_layers"].value
    return sharing.identity_of(vllm_config, folder, str(use), resident)


def _check_banks(share: Setting, identity: Mapping[str, str], name: str) -> None:
    """Raise SettingError if this user has banks of this model, and none holds these experts.

    Loading them here would take their memory once more, which is what a bank is to prevent. Banks
    of other models are left alone.
    """
    found = banks.banks(identified=True)
    if all(bank.name != name for bank in found) and banks.wake():
        found = banks.banks(identified=True)
    found = [bank for bank in found if sharing.same_model(identity, bank.identity)]
    if not found or any(bank.name == name for bank in found):
        return
    bank = min(found, key=lambda bank: len(banks.differences(identity, bank.identity)))
    said = "; ".join(banks.differences(identity, bank.identity))
    raise share.refuse(
        f"the bank of process {bank.pid}, which holds {bank.model}, has other experts: {said}."
        " `lvllm bank` loads these into another bank, and 0 loads them here"
    )


def _check_checkpoint(vllm_config: Any) -> None:
    """Read the headers of the files in a local folder. Downloaded files are checked when loaded."""
    folder, load_format = Path(vllm_config.model_config.model), vllm_config.load_config.load_format
    if not is_moe(vllm_config.model_config) or not folder.is_dir():
        return
    if any(folder.glob("*/*.safetensors")) and not any(folder.glob("*.safetensors")):
        return  # Some models keep their weights in subfolders, which vLLM's loader knows.
    if load_format == "auto" and any(folder.glob("consolidated*.safetensors")):
        # vLLM prefers Mistral's own format where a folder has both formats.
        index = "consolidated.safetensors.index.json"
        Checkpoint.open(folder, "consolidated*.safetensors", index)
    elif load_format in ("auto", "hf", "safetensors"):
        Checkpoint.open(folder)


def _check_shared_memory(parallel: Any) -> None:
    """Raise LvllmError if the queue to the workers, which vLLM makes, has no room in /dev/shm."""
    from vllm import envs
    from vllm.distributed.device_communicators import shm_broadcast

    # Releases without this function use memory that /dev/shm may not have.
    if parallel.distributed_executor_backend == "mp" and hasattr(
        shm_broadcast, "check_shm_free_space"
    ):
        room.check_shared_memory(room.queue_bytes(envs.VLLM_MQ_MAX_CHUNK_BYTES_MB))


def _is_one_of_several_api_servers(parallel: Any) -> bool:
    """Whether this is an API server beside others, and not the process that starts them.

    With data parallelism there are as many API servers as replicas, and each builds the
    configuration again. The process that starts them has the rank -1.
    """
    return parallel._api_process_count > 1 and parallel._api_process_rank >= 0


def _keep_streamed_batches_out_of_graphs(compilation: Any, threshold: int | str) -> None:
    """Cut vLLM's captured graph sizes to those below the threshold.

    A batch that runs from a captured graph is computed on the CPU, so a larger size would keep
    batches from being streamed. One size is always left, since vLLM's graphs need at least one. A
    threshold that is still to be measured needs no cut, because it will lie above the captured
    sizes.
    """
    if isinstance(threshold, str):
        return
    sizes = sorted(compilation.cudagraph_capture_sizes or ())
    shorter = [size for size in sizes if size < threshold] or sizes[:1]
    if threshold and shorter:
        compilation.cudagraph_capture_sizes = shorter
        compilation.max_cudagraph_capture_size = shorter[-1]


def check_operators(name: str = "silu_and_mul") -> None:
    """Raise LvllmError if vLLM's operators for CPUs, such as `name`, are not there.

    vLLM only warns where their library cannot be loaded, and each worker ends in a traceback.
    """
    import torch
    from vllm import _custom_ops  # noqa: F401  It loads the library.

    if not hasattr(torch.ops._C, name):
        raise LvllmError(
            "vLLM's operators for CPUs cannot be loaded, and its warning above says why; they need"
            " libnuma (Debian, Ubuntu: apt install libnuma1)"
        )


def _prepare_cpu_platform(vllm_config: Any, config: HybridConfig) -> None:
    """Configure vLLM's CPU platform, for runs without an accelerator and with `host` as one."""
    check_operators()
    if vllm_config.parallel_config.worker_cls == CPU_WORKER:
        # LvLLM's worker does the same as vLLM's, and watches the experts' output for NaN.
        vllm_config.parallel_config.worker_cls = "lvllm.worker.cpu.HybridCPUWorker"
    # Attention between the tokens of a picture needs all of them in one step. On GPUs vLLM sees to
    # that itself.
    if vllm_config.model_config.is_mm_prefix_lm:
        vllm_config.scheduler_config.disable_chunked_mm_input = True
    if _on_ray(vllm_config):
        from vllm.utils.import_utils import resolve_obj_by_qualname

        executor = resolve_obj_by_qualname("lvllm.worker.ray.HybridRayExecutor")
        vllm_config.parallel_config.distributed_executor_backend = executor
    else:
        # vLLM binds the OpenMP threads of rank n to the n-th list of CPUs. vLLM's own lists
        # ("auto") need a NUMA node for each rank and keep a core free. Ours give PyTorch the cores
        # that lk computes on, since the two never compute at the same time.
        _bind_omp_threads("|".join(",".join(map(str, own)) for own in config.omp_cpus))
    # For the same reason OpenMP's threads must not spin for milliseconds after their part. With
    # this value they spin for about 10 us: decoding a model of 2 GiB on 2 cores went from 88 to 120
    # tokens per second. With threads that sleep at once (OMP_WAIT_POLICY=passive) it was 102, since
    # waking them inside attention takes time too.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")


_bound: str | None = None
"""What an earlier model of this process was bound to."""


def _bind_omp_threads(cpus_of_ranks: str) -> None:
    global _bound
    given = os.environ.get(OMP_BIND, "auto")
    if given not in ("auto", cpus_of_ranks, _bound):
        logger.warning(
            "LvLLM: %s=%r is replaced by %r, the CPUs of the engine: LK_THREADS, OMP_NUM_THREADS"
            " and taskset choose others",
            OMP_BIND,
            given,
            cpus_of_ranks,
        )
    os.environ[OMP_BIND] = _bound = cpus_of_ranks
