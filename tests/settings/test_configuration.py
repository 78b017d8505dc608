"""Resolve settings from environment and YAML, and check them with a model's vLLM configuration."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from threading import Timer
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lvllm import engine, prepare, sharing
from lvllm.bank import holder
from lvllm.bank.holder import Holder
from lvllm.errors import LvllmError
from lvllm.handover import banks
from lvllm.machine import cpus, memory_plan
from lvllm.prefill import configuration as prefill
from lvllm.settings import variables
from lvllm.settings.configuration import RESOLVED, HybridConfig, PrefillEngine
from lvllm.settings.model_checks import (
    CPU_WORKER,
    GPU_WORKER,
    LONGCAT,
    V3_ROUTING,
    dense_weight,
)
from lvllm.settings.resolving import resolve
from lvllm.settings.use_weight import LayerFormats, UseWeight
from tests.models.make import ARCHITECTURES, COMMON

vllm = pytest.importorskip("vllm")


def test_environment_wins_over_yaml_over_default() -> None:
    environ = {"LK_THREADS": "3", "LK_POWER_SAVING": ""}
    settings = resolve(environ, {"lk_threads": 5, "lk_power_saving": True})
    assert (settings["lk_threads"].value, settings["lk_threads"].source) == (3, "environment")
    assert (settings["lk_power_saving"].value, settings["lk_power_saving"].source) == (
        True,
        "config",
    )
    assert settings["gpu_prefetch_window"].source == "default"


def test_yaml_layers_may_be_a_number_a_text_or_a_list() -> None:
    for written in (0, "0", [0]):
        settings = resolve({}, {"gpu_resident_moe_layers": written})
        assert settings["gpu_resident_moe_layers"].value == (0,)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"gpu_prefetch_windo": 1}, "did you mean gpu_prefetch_window?"),
        ({"moe_numa_enabled": 1}, "only the variable LVLLM_MOE_NUMA_ENABLED sets it"),
        ({"lk_threads": "many"}, "additional_config.lvllm.lk_threads='many' is not allowed"),
        ({"gpu_prefetch_window": -1}, "gpu_prefetch_window=-1 is not allowed: a whole number"),
        ([1], "additional_config.lvllm=[1] is not allowed: a mapping"),
    ],
)
def test_bad_sections(section: object, message: str) -> None:
    with pytest.raises(variables.SettingError) as caught:
        resolve({}, section)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bad_yaml_value_is_refused_even_when_the_variable_wins() -> None:
    with pytest.raises(variables.SettingError, match="lk_threads='x'"):
        resolve({"LK_THREADS": "1"}, {"lk_threads": "x"})


@pytest.fixture
def configure(qwen3_moe: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that builds vLLM's configuration as `vllm serve` does, with LvLLM enabled."""
    from lvllm import plugin

    monkeypatch.setenv("LVLLM_MOE_NUMA_ENABLED", "1")
    # Preparing a configuration sets this variable for the workers; monkeypatch restores it.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "auto")
    # Banks that run on this machine hold other experts.
    monkeypatch.setattr(banks, "PREFIX", f"lvllm/test/{os.getpid()}/bank/")

    def build(environment: dict[str, str] | None = None, **arguments: Any) -> Any:
        from vllm.engine.arg_utils import EngineArgs

        for name, value in (environment or {}).items():
            monkeypatch.setenv(name, value)
        plugin.register()
        defaults: dict[str, Any] = {
            "model": str(qwen3_moe),
            "skip_tokenizer_init": True,
            "enforce_eager": True,
            "max_model_len": 128,
            "max_num_batched_tokens": 256,
        }
        return EngineArgs(**{**defaults, **arguments}).create_engine_config()

    return build


CPUS = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("LVLLM_MOE_NUMA_ENABLED", "2", "0 or 1"),
        ("LK_THREAD_BINDING", "CORE", "CPU_CORE or NUMA_NODE"),
        ("LK_THREADS", "8192", f"allowed is 1 to {CPUS}"),
        ("OMP_NUM_THREADS", "8192", f"allowed is 1 to {CPUS}"),
        ("OMP_NUM_THREADS", "0", "a whole number from 1"),
        ("LVLLM_MOE_USE_WEIGHT", "int8", "TO_DTYPE, KEEP, INT4, INT8 or FP8"),
        ("LVLLM_DENSE_WEIGHT", "INT4", "KEEP or INT8"),
        ("LVLLM_GPU_RESIDENT_MOE_LAYERS", "0-", "layer indices"),
        ("LVLLM_GPU_RESIDENT_MOE_LAYERS", "9-3", "layer indices"),
        ("LVLLM_GPU_RESIDENT_MOE_LAYERS", "1", "those that have are 0,2"),
        ("LVLLM_GPU_RESIDENT_MOE_LAYERS", "0,7", "those that have are 0,2"),
        ("LVLLM_GPU_RESIDENT_MOE_LAYERS", "0,2", "allowed is empty"),
        ("LVLLM_GPU_PREFETCH_WINDOW", "-1", "a whole number from 0 to 9999"),
        ("LVLLM_GPU_PREFETCH_WINDOW", "1", "allowed is 0 or empty"),
        ("LVLLM_GPU_PREFILL_MIN_BATCH_SIZE", "257", "allowed is 0 to 256"),
        ("LVLLM_GPU_PREFILL_MIN_BATCH_SIZE", "256", "allowed is 0 or empty"),
        ("LVLLM_GPU_PREFILL_MIN_BATCH_SIZE", "auto", "is none; allowed is 0 or empty"),
        ("LVLLM_GPU_PREFILL_MIN_BATCH_SIZE", "Auto", "max_num_batched_tokens, or auto"),
        ("LVLLM_DEFER_EXPERTS", "-1", "a whole number from 0 to one less than the experts that"),
        ("LVLLM_DEFER_EXPERTS", "1", "as LVLLM_ACCELERATOR is none; allowed is 0 or empty"),
        ("LVLLM_ACCELERATOR", "gpu", "cuda, host or none"),
        ("LVLLM_ACCELERATOR", "cuda", "on vLLM's CPU platform allowed is none or host"),
        ("LVLLM_WATCHDOG_SECONDS", "-1", "a whole number from 0 to 86400"),
        ("LK_POWER_SAVING", "yes", "0 or 1"),
        ("LVLLM_ENABLE_NUMA_INTERLEAVE", "2", "0 or 1"),
        (
            "LVLLM_MOE_QUANT_ON_GPU",
            "1",
            "LVLLM_MOE_USE_WEIGHT=INT4, INT8 or FP8, none of which is set; allowed is 0",
        ),
        ("LVLLM_PREFILL_ENGINE", "1", "0, auto or a whole number from 2 to"),
        ("LVLLM_PREFILL_ENGINE", "129", "no prompt has 129 tokens, as max-model-len is 128"),
        ("LVLLM_PREFILL_ENGINE", "auto", "no prompt has 512 tokens, as max-model-len is 128"),
        ("LVLLM_PREFILL_ENGINE_GPU", "1", "LVLLM_PREFILL_ENGINE is 0; allowed is empty"),
        (
            "LK_ISA",
            "avx9",
            "portable, avx2, avx2_vnni, avx512, avx512_vnni, avx512_vbmi, avx512_bf16",
        ),
        ("LK_ACTIVATION_BITS", "4", "auto, 8 or 16"),
        ("LK_ACTIVATION_BITS", "08", "auto, 8 or 16"),
        ("LK_ACTIVATION_BITS", "Auto", "auto, 8 or 16"),
    ],
)
def test_refusals_are_one_line(configure: Any, name: str, value: str, allowed: str) -> None:
    with pytest.raises(LvllmError) as caught:
        configure({name: value})
    message = str(caught.value)
    assert message.startswith(f"{name}={value!r}")
    assert allowed in message
    assert "\n" not in message


def changed(model: Path, folder: Path, **changes: Any) -> Path:
    """A copy of the model with other values in its config.json; "none" removes a key."""
    shutil.copytree(model, folder)
    file = folder / "config.json"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in values.items() if value != "none"}))
    return folder


VERSIONS = f"vLLM {vllm.__version__} nor transformers {transformers.__version__} knows"
TOP_K = "is not allowed: a whole number from 1 to 8 is wanted"
NO_EXPERTS = (
    "is not allowed: a whole number from 1 is wanted, since the files have weights of experts"
)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_experts_per_tok": 0}, f"num_experts_per_tok=0 {TOP_K}"),
        ({"num_experts_per_tok": 9}, f"num_experts_per_tok=9 {TOP_K}"),
        ({"num_experts_per_tok": None}, "field 'num_experts_per_tok'"),
        ({"num_local_experts": 0}, f"num_local_experts=0 {NO_EXPERTS}"),
        ({"num_local_experts": None}, f"num_local_experts=null {NO_EXPERTS}"),
        ({"num_local_experts": "none", "num_experts": 0}, f"num_experts=0 {NO_EXPERTS}"),
        (
            {"quantization_config": {"quant_method": "new"}},
            "quantization_config.quant_method='new' is not allowed: neither vLLM",
        ),
        ({"quantization_config": {"quant_method": 3}}, "quant_method=3 is not allowed"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config: Cannot find any"),
        ({"model_type": "new"}, f"model_type='new' is not allowed: neither {VERSIONS}"),
        ({"model_type": ""}, f"model_type='' is not allowed: neither {VERSIONS}"),
        ({"model_type": "none"}, "has no model_type"),
        ({"architectures": ["New"]}, f'architectures=["New"] is not allowed: neither {VERSIONS}'),
        ({"architectures": []}, "has no architectures"),
        ({"architectures": "none"}, "has no architectures"),
    ],
    ids=str,
)
def test_models_that_are_described_wrongly(
    configure: Any, qwen3_moe: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    folder = changed(qwen3_moe, tmp_path / "model", **changes)
    with pytest.raises(LvllmError) as caught:
        configure(model=str(folder))
    line = str(caught.value)
    assert line.startswith(str(folder))
    assert "config.json: " in line
    assert said in line
    assert "\n" not in line
    assert len(line) < len(str(folder)) + 400


def test_wrong_descriptions_that_are_overridden(
    configure: Any, qwen3_moe: Path, tmp_path: Path
) -> None:
    right = {"num_local_experts": 8, "num_experts_per_tok": 3}
    names = {"architectures": ["Qwen3MoeForCausalLM"]}
    folder = changed(
        qwen3_moe, tmp_path / "model", num_local_experts=0, num_experts_per_tok=9, architectures=[]
    )
    built = configure(model=str(folder), hf_overrides=right | names)
    assert RESOLVED in built.additional_config
    built = configure(model=str(folder), hf_overrides=right, runner="pooling")
    assert RESOLVED in built.additional_config


def test_a_model_without_experts_is_none(configure: Any, qwen3_moe: Path, tmp_path: Path) -> None:
    """Its config.json may say so. Some families have published such models."""
    folder = changed(qwen3_moe, tmp_path / "model", num_local_experts=0)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({name: data for name, data in tensors.items() if ".experts." not in name}, file)
    assert RESOLVED not in configure(model=str(folder)).additional_config


def test_other_refusals_of_vllm_stay_as_they_are(configure: Any) -> None:
    with pytest.raises(ValueError, match="max_model_len") as caught:
        configure(max_model_len=10**6)
    assert not isinstance(caught.value, LvllmError)


def test_int4_of_4_bit_experts_is_refused(configure: Any, qwen3_moe: Path, tmp_path: Path) -> None:
    shutil.copytree(qwen3_moe, tmp_path / "awq")
    path = tmp_path / "awq" / "config.json"
    how = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": how}))
    with pytest.raises(LvllmError) as caught:
        configure({"LVLLM_MOE_USE_WEIGHT": "INT4"}, model=str(tmp_path / "awq"))
    assert str(caught.value).startswith("LVLLM_MOE_USE_WEIGHT='INT4': the experts of ")
    assert str(caught.value).endswith("in 4 bits already; allowed is KEEP or TO_DTYPE")


BY_LAYER = [{r"layers\.[01]\.": "TO_DTYPE"}, {".*": "INT4"}]


def test_formats_by_layer(configure: Any) -> None:
    """They come from YAML as a list and from the environment as JSON, and reach the workers."""
    built = configure(additional_config={"lvllm": {"moe_use_weight": BY_LAYER}})
    use = HybridConfig.carried(built).use_weight
    layers = ("model.layers.0.mlp.experts", "model.layers.2.mlp.experts")
    assert [use.of(name) for name in layers] == ["TO_DTYPE", "INT4"]
    built = configure({"LVLLM_MOE_USE_WEIGHT": json.dumps(BY_LAYER[:1])})
    assert HybridConfig.carried(built).use_weight.of(layers[1]) == "KEEP"
    shared = {
        configure({"LVLLM_MOE_USE_WEIGHT": text, "LVLLM_SHARE_EXPERTS": "1"}).additional_config[
            RESOLVED
        ]["shared_experts"]
        for text in ("INT4", "", json.dumps(BY_LAYER), json.dumps(BY_LAYER[:1]))
    }
    assert len(shared) == 4, "engines share experts only if each layer has the same format"


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            [*BY_LAYER, {"x": "INT2"}],
            "rule 3: 'INT2': Input should be 'TO_DTYPE', 'KEEP', 'INT4', 'INT8' or 'FP8'",
        ),
        ([{"(": "INT4"}], "rule 1: '(' is no regular expression: missing )"),
        ([{"a": "INT4", "b": "INT4"}], "rule 1: {'a': 'INT4', 'b': 'INT4'} is not one pattern"),
        (
            [{r"layers\.1\.": "INT4"}],
            r"'layers\.1\.' matches nothing; the layers are model.layers.0.mlp.experts to"
            " model.layers.2.mlp.experts",
        ),
        ([*BY_LAYER, {"layers.0": "KEEP"}], "'layers.0' comes too late: rules before it match all"),
        ([{".*": "KEEP"}, {"layers.0": "INT4"}], "'layers.0' comes too late: rules before it"),
    ],
)
def test_wrong_rules(configure: Any, rules: Any, message: str) -> None:
    with pytest.raises(LvllmError) as caught:
        configure(additional_config={"lvllm": {"moe_use_weight": rules}})
    said = str(caught.value)
    assert said.startswith("additional_config.lvllm.moe_use_weight=")
    assert message in said
    assert "\n" not in said
    with pytest.raises(LvllmError) as caught:
        configure({"LVLLM_MOE_USE_WEIGHT": json.dumps(rules)})
    assert str(caught.value).startswith("LVLLM_MOE_USE_WEIGHT='[{")
    assert message in str(caught.value)


def test_rules_need_the_models_files(configure: Any, qwen3_moe: Path, tmp_path: Path) -> None:
    shutil.copy(qwen3_moe / "config.json", tmp_path)
    section = {"lvllm": {"moe_use_weight": BY_LAYER}}
    with pytest.raises(
        LvllmError, match="names of experts in the model's files, and on this machine are"
    ):
        configure(model=str(tmp_path), load_format="dummy", additional_config=section)
    section = {"lvllm": {"moe_use_weight": [{".*": "INT4"}]}}
    configure(model=str(tmp_path), load_format="dummy", additional_config=section)


def test_rules_for_a_model_whose_modules_vllm_renames(
    configure: Any, monkeypatch: pytest.MonkeyPatch, qwen3_moe: Path
) -> None:
    from vllm.model_executor.models.qwen3_moe import Qwen3MoeForCausalLM
    from vllm.model_executor.models.utils import WeightsMapper

    mapper = WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."})
    monkeypatch.setattr(Qwen3MoeForCausalLM, "hf_to_vllm_mapper", mapper, raising=False)
    rules = [{"^language_model.*layers.0": "INT4"}]
    built = configure(additional_config={"lvllm": {"moe_use_weight": rules}})
    need = memory_plan._need_of(built, HybridConfig.carried(built).use_weight, 1, None)
    kept = memory_plan._need_of(built, None, 1, None)
    assert need is not None
    assert kept is not None
    # One of two layers has 4.5 bits for 16.
    assert need.experts == kept.experts // 2 + kept.experts_int4 // 2
    with pytest.raises(LvllmError, match=r"the layers are language_model\.model\.layers\.0\."):
        configure(additional_config={"lvllm": {"moe_use_weight": [{"^model": "INT4"}]}})


def test_int8_of_linear_layers(configure: Any) -> None:
    """They are on the engine unless vLLM's platform is a GPU."""
    chosen = configure({"LVLLM_DENSE_WEIGHT": "INT8", "LVLLM_ACCELERATOR": "host"})
    assert HybridConfig.carried(chosen).dense_weight == "INT8"
    setting = resolve({"LVLLM_DENSE_WEIGHT": "INT8"}, None)["dense_weight"]
    with pytest.raises(variables.SettingError, match=r"'INT8': linear .* GPU; allowed is KEEP"):
        dense_weight(setting, "cuda", chosen.model_config)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_quantising_on_a_missing_gpu_is_refused(configure: Any) -> None:
    with pytest.raises(LvllmError, match=r"LVLLM_MOE_QUANT_ON_GPU='1': there is no GPU; allowed"):
        configure({"LVLLM_MOE_USE_WEIGHT": "INT4", "LVLLM_MOE_QUANT_ON_GPU": "1"})


def test_the_same_refusals_for_yaml(configure: Any) -> None:
    section = {"lvllm": {"gpu_resident_moe_layers": "5"}}
    with pytest.raises(LvllmError, match=r"gpu_resident_moe_layers='5': layer 5 .* are 0,2"):
        configure(additional_config=section)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "float32"}, "dtype='float32' is not allowed"),
        ({"quantization": "experts_int8"}, "quantization='experts_int8' of .* is not supported"),
        ({"worker_cls": "some.Worker"}, "worker-cls='some.Worker' is not allowed"),
        ({"scheduler_cls": "some.Scheduler"}, "scheduler-cls='some.Scheduler' is not allowed"),
        ({"tensor_parallel_size": 3}, "^tensor-parallel-size=3 is not allowed .* attention heads"),
        ({"data_parallel_size": 3}, "^data-parallel-size=3 with .* 3 processes .* of each expert"),
    ],
)
def test_models_that_lk_cannot_run(configure: Any, arguments: Any, message: str) -> None:
    with pytest.raises(LvllmError, match=message):
        configure(**arguments)


def test_workers_get_final_values(configure: Any) -> None:
    built = configure({"LK_THREADS": "1", "LVLLM_MOE_USE_WEIGHT": "KEEP", "LK_POWER_SAVING": "1"})
    resolved = HybridConfig.model_validate(built.additional_config[RESOLVED])
    assert resolved.power_saving
    assert not resolved.own_cores
    assert (resolved.use_weight, resolved.quantize_on) == (LayerFormats(), "cpu")
    assert resolved.dense_weight == "KEEP"
    assert [len(cpus) for cpus in resolved.engine_cpus] == [1]
    assert resolved.omp_cpus == resolved.engine_cpus
    assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == str(resolved.omp_cpus[0][0])
    assert built.parallel_config.worker_cls == "lvllm.worker.cpu.HybridCPUWorker"
    assert not resolved.numa_interleave


def test_a_binding_is_not_replaced_without_a_word(
    configure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(prepare.logger, "warning", lambda text, *of: said.append(text % of))
    configure({"VLLM_CPU_OMP_THREADS_BIND": "nobind"})
    ours = os.environ["VLLM_CPU_OMP_THREADS_BIND"]
    configure()
    assert len(said) == 1
    assert said[0].startswith(f"LvLLM: VLLM_CPU_OMP_THREADS_BIND='nobind' is replaced by '{ours}'")


def test_a_model_without_experts_is_left_to_vllm(configure: Any, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**COMMON, architectures=["LlamaForCausalLM"])
    config.save_pretrained(tmp_path)
    built = configure(model=str(tmp_path), dtype="float32")
    assert built.additional_config == {}
    assert built.parallel_config.worker_cls == CPU_WORKER
    assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "auto"
    with pytest.raises(LvllmError, match=r"LVLLM_DENSE_WEIGHT='INT8': .* has no routed experts"):
        configure({"LVLLM_DENSE_WEIGHT": "INT8"}, model=str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "use"),
    [
        ({"quantization": "fp8_per_channel"}, "FP8"),
        ({"quantization": "int8_per_channel_weight_only"}, "INT8"),
        ({"quantization": "online", "quantization_config": {"moe": "int4_per_group_32"}}, "INT4"),
        ({"quantization": "online", "quantization_config": {"moe": "fp8_per_block"}}, "FP8"),
        ({"quantization": "online", "quantization_config": {"linear": "fp8_per_channel"}}, "KEEP"),
    ],
)
def test_vllms_quantisation_while_loading(configure: Any, arguments: Any, use: str) -> None:
    built = configure(**arguments)
    assert HybridConfig.carried(built).use_weight == LayerFormats(others=UseWeight(use))
    # A setting of ours decides about experts alone.
    built = configure({"LVLLM_MOE_USE_WEIGHT": "TO_DTYPE"}, **arguments)
    assert HybridConfig.carried(built).use_weight == LayerFormats(others=UseWeight.TO_DTYPE)


@pytest.mark.parametrize(
    ("scheme", "config", "message"),
    [
        ("fp8", None, "'fp8': vLLM has no kernel for linear .* fp8_per_channel and int8"),
        ("fp8_per_block", None, "'fp8_per_block': vLLM has no kernel for linear layers in"),
        ("mxfp4", None, "'mxfp4': LvLLM quantises no experts in this way; allowed are .*INT4"),
        ("nvfp4_per_token", None, "'nvfp4_per_token': LvLLM quantises no experts"),
        ("fp8_per_channel", {"ignore": ["*layers.0*"]}, "targets or ignore .*USE_WEIGHT"),
        ("online", {"targets": {"*": "fp8_per_channel"}}, "targets or ignore .*USE_WEIGHT"),
    ],
)
def test_quantisation_while_loading_that_lk_has_not(
    configure: Any, scheme: str, config: Any, message: str
) -> None:
    with pytest.raises(LvllmError, match=rf"^quantization.*{message}") as caught:
        configure(quantization=scheme, quantization_config=config)
    assert "\n" not in str(caught.value)


def test_quantisation_of_what_a_checkpoint_left_alone(
    configure: Any, qwen3_moe: Path, tmp_path: Path
) -> None:
    config = json.loads((qwen3_moe / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config["quantization_config"]["activation_scheme"] = "dynamic"
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = {"model": str(tmp_path), "load_format": "dummy"}
    more = {"quantization_config": {"moe": "int8_per_channel_static"}}
    assert HybridConfig.carried(configure(**arguments)).use_weight.others == "KEEP"
    assert HybridConfig.carried(configure(**arguments, **more)).use_weight.others == "INT8"


@pytest.mark.parametrize(
    ("written", "missing"),
    [
        ({}, '"topk_method": "noaux_tc", "scoring_func": "sigmoid"'),
        ({"topk_method": "noaux_tc"}, '"scoring_func": "sigmoid"'),
        (V3_ROUTING, None),
    ],
)
def test_a_deepseek_v3_as_transformers_writes_it(
    configure: Any, tmp_path: Path, written: dict[str, str], missing: str | None
) -> None:
    config = transformers.DeepseekV3Config(
        **(COMMON | ARCHITECTURES["deepseek_v3"][1]), architectures=["DeepseekV3ForCausalLM"]
    ).to_dict()
    kept = {key: value for key, value in config.items() if key not in V3_ROUTING}
    (tmp_path / "config.json").write_text(json.dumps(kept | written))
    arguments = {"model": str(tmp_path), "dtype": "bfloat16", "load_format": "dummy"}
    if missing is None:
        configure(**arguments)
        return
    with pytest.raises(LvllmError, match=f"lacks .* add {missing} to it, or") as caught:
        configure(**arguments)
    assert "\n" not in str(caught.value)
    configure(hf_overrides=V3_ROUTING, **arguments)


@pytest.mark.parametrize(
    ("written", "arguments", "message"),
    [
        (LONGCAT, {}, None),
        (
            LONGCAT | {"zero_expert_type": None},
            {},
            ': config.json of a longcat_flash lacks zero_expert_type, .* "identity"',
        ),
        (
            {"zero_expert_type": "identity"},
            {},
            ' lacks mla_scale_q_lora and mla_scale_kv_lora, .* "mla_scale_kv_lora": true to it, or',
        ),
        (LONGCAT | {"zero_expert_type": "copy"}, {}, ": zero_expert_type='copy' .*: identity$"),
        (LONGCAT, {"data_parallel_size": 2}, "^data-parallel-size=2 is not allowed for .*: 1$"),
    ],
)
def test_zero_computation_experts(
    configure: Any, tmp_path: Path, written: Any, arguments: Any, message: str | None
) -> None:
    config = transformers.LongcatFlashConfig(
        **(COMMON | ARCHITECTURES["longcat_flash"][1]), architectures=["LongcatFlashForCausalLM"]
    ).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config | written))
    model = {"model": str(tmp_path), "dtype": "bfloat16", "load_format": "dummy"}
    if message is None:
        configure(**model, **arguments)
        return
    with pytest.raises(LvllmError, match=message) as caught:
        configure(**model, **arguments)
    assert "\n" not in str(caught.value)


def test_workers_get_the_settings_of_gpu_offload(
    configure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved = HybridConfig.model_validate(configure().additional_config[RESOLVED])
    assert (resolved.accelerator, resolved.gpu_resident_moe_layers) == ("none", ())
    assert (resolved.gpu_prefetch_window, resolved.gpu_prefill_min_batch_size) == (0, 0)
    assert resolved.watchdog_seconds == 120
    assert resolved.defer_experts == 0
    offload = {
        "LVLLM_ACCELERATOR": "host",
        "LVLLM_GPU_RESIDENT_MOE_LAYERS": "2",
        "LVLLM_GPU_PREFETCH_WINDOW": "1",
        "LVLLM_GPU_PREFILL_MIN_BATCH_SIZE": "256",
        "LVLLM_WATCHDOG_SECONDS": "0",
    }
    resolved = HybridConfig.model_validate(configure(offload).additional_config[RESOLVED])
    assert (resolved.accelerator, resolved.gpu_resident_moe_layers) == ("host", (2,))
    assert (resolved.gpu_prefetch_window, resolved.gpu_prefill_min_batch_size) == (1, 256)
    assert resolved.watchdog_seconds == 0
    offload["LVLLM_GPU_PREFILL_MIN_BATCH_SIZE"] = "auto"
    resolved = HybridConfig.model_validate(configure(offload).additional_config[RESOLVED])
    assert (resolved.gpu_prefetch_window, resolved.gpu_prefill_min_batch_size) == (1, "auto")


@pytest.mark.parametrize(
    ("count", "resident", "arguments", "message"),
    [
        ("3", "", {}, " takes 3 experts, and one of them is not deferred; allowed is 0 to 2"),
        (
            "1",
            "",
            {"tensor_parallel_size": 2, "enable_expert_parallel": True},
            "with enable-expert-parallel no rank knows all experts of a token, and which of them"
            " weigh least; allowed is 0",
        ),
        ("1", "2", {}, "one layer on the CPU later, and there are 1 such layers; allowed is 0"),
    ],
)
def test_experts_that_cannot_be_deferred(
    configure: Any, count: str, resident: str, arguments: Any, message: str
) -> None:
    environment = {"LVLLM_ACCELERATOR": "host", "LVLLM_DEFER_EXPERTS": count}
    with pytest.raises(LvllmError) as caught:
        configure(environment | {"LVLLM_GPU_RESIDENT_MOE_LAYERS": resident}, **arguments)
    said = str(caught.value)
    assert said.startswith(f"LVLLM_DEFER_EXPERTS={count!r}: ")
    assert said.endswith(message)
    assert "\n" not in said


def test_on_vllms_cuda_platform(configure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """LvLLM's GPU worker replaces vLLM's. OpenMP's threads are bound on the CPU platform only."""
    from lvllm.machine import gpu_distance

    built = configure({"LVLLM_GPU_RESIDENT_MOE_LAYERS": ""})
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "auto")
    platform = SimpleNamespace(
        is_cpu=lambda: False,
        is_cuda=lambda: True,
        device_name="cuda",
        get_device_numa_node=lambda rank: None,
    )
    monkeypatch.setattr(vllm.platforms, "current_platform", platform)
    assert gpu_distance.of_gpus() is not None
    built.parallel_config.worker_cls = GPU_WORKER

    def prepared(resident: str, worker: str = GPU_WORKER) -> HybridConfig:
        built.additional_config.pop(RESOLVED, None)
        built.parallel_config.worker_cls = worker
        monkeypatch.setenv("LVLLM_GPU_RESIDENT_MOE_LAYERS", resident)
        prepare.prepare(built)
        return HybridConfig.model_validate(built.additional_config[RESOLVED])

    with pytest.raises(
        variables.SettingError, match=r"worker-cls='vllm.*CPUWorker' is not allowed"
    ):
        prepared("0,2", CPU_WORKER)
    # The host needs no memory for experts that the GPU holds.
    monkeypatch.setattr(memory_plan.bank, "available_bytes", lambda: 0)
    resolved = prepared("0,2")
    assert (resolved.accelerator, resolved.gpu_resident_moe_layers) == ("cuda", (0, 2))
    assert built.parallel_config.worker_cls == "lvllm.worker.gpu.HybridGPUWorker"
    assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "auto"
    for spare in (True, False):
        monkeypatch.setattr(cpus, "spares_a_core", lambda *_, spare=spare: spare)
        assert prepared("0,2").own_cores == spare
    monkeypatch.setattr(cpus, "spares_a_core", lambda *_: True)
    monkeypatch.setenv("LVLLM_SHARE_EXPERTS", "1")
    assert not prepared("0,2").own_cores
    monkeypatch.delenv("LVLLM_SHARE_EXPERTS")
    with pytest.raises(variables.SettingError, match=r"the model takes 0\.00 GiB of memory"):
        prepared("0")
    # Batches that run from graphs are computed on the CPU, so graphs are for smaller batches only.
    compilation = built.compilation_config
    for threshold, sizes in (
        ("", [1, 8, 16, 24]),
        ("17", [1, 8, 16]),
        ("16", [1, 8]),
        ("1", [1]),
        ("auto", [1, 8, 16, 24]),
    ):
        compilation.cudagraph_capture_sizes = [1, 8, 16, 24]
        compilation.max_cudagraph_capture_size = 24
        monkeypatch.setenv("LVLLM_GPU_PREFILL_MIN_BATCH_SIZE", threshold)
        monkeypatch.setenv("LVLLM_SHARE_EXPERTS", threshold and "1")
        assert (prepared("0,2").shared_experts is not None) == bool(threshold)
        assert compilation.cudagraph_capture_sizes == sizes
        assert compilation.max_cudagraph_capture_size == sizes[-1]


def test_weights_that_leave_no_room_for_a_kv_cache(configure: Any) -> None:
    with pytest.raises(LvllmError, match=r"weights take 0\.00 GiB: kv-cache-memory-bytes sets"):
        configure(gpu_memory_utilization=1e-6)
    configure(gpu_memory_utilization=1e-6, kv_cache_memory_bytes=1 << 20)


def test_only_the_process_that_starts_the_engines_checks_the_memory(
    configure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several API servers build the configuration again, while the engines fill the memory."""
    monkeypatch.setattr(memory_plan.bank, "available_bytes", lambda: 0)
    servers = {"_api_process_count": 2, "data_parallel_size": 2}
    with pytest.raises(LvllmError, match=r"the model takes 0\.00 GiB of memory"):
        configure(**servers, _api_process_rank=-1)
    for rank in range(2):
        built = configure(**servers, _api_process_rank=rank)
        assert RESOLVED not in built.additional_config


@pytest.mark.parametrize(("free", "interleaved"), [(1 << 30, False), (1 << 10, True)])
def test_pages_are_interleaved_where_a_node_is_too_small(
    configure: Any, monkeypatch: pytest.MonkeyPatch, free: int, interleaved: bool
) -> None:
    """The workers' node has `free` bytes for experts, and another node has plenty."""
    home = engine.topology().nodes[0].id
    nodes = {home: free, home + 1: 1 << 40}
    monkeypatch.setattr(memory_plan, "free_on_nodes", lambda: nodes)
    plain = memory_plan._need_of
    monkeypatch.setattr(
        memory_plan, "_need_of", lambda *given: replace(cast(Any, plain(*given)), others=0)
    )
    built = configure({"LVLLM_ENABLE_NUMA_INTERLEAVE": "1"})
    resolved = HybridConfig.model_validate(built.additional_config[RESOLVED])
    assert resolved.numa_interleave == interleaved
    if interleaved:
        with pytest.raises(LvllmError, match="LVLLM_ENABLE_NUMA_INTERLEAVE=1 makes it fit"):
            configure({"LVLLM_ENABLE_NUMA_INTERLEAVE": "0"})


def test_shared_experts(configure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines that share experts use the same name. Experts in memory need no further memory."""

    def name(built: Any) -> str | None:
        return HybridConfig.model_validate(built.additional_config[RESOLVED]).shared_experts

    assert name(configure()) is None
    with monkeypatch.context() as patch:
        shared = name(configure({"LVLLM_SHARE_EXPERTS": "1"}))
        assert shared is not None
        assert name(configure(max_model_len=64)) == shared
        assert name(configure(tensor_parallel_size=2)) != shared
        with pytest.raises(LvllmError, match=r"LVLLM_SHARE_EXPERTS='1': it needs load-format .*my"):
            configure(load_format="dummy")
        plain = memory_plan._need_of
        patch.setattr(
            memory_plan,
            "_need_of",
            lambda *given: replace(cast(Any, plain(*given)), experts=1 << 50),
        )
        with pytest.raises(LvllmError, match=r"experts 1048576\.00 GiB"):
            configure()
        owner = sharing.join(f"{shared}/0")
        assert name(configure()) == shared
        owner.close()


def test_a_bank_holds_these_experts_or_the_start_ends(
    configure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def built(**arguments: Any) -> HybridConfig:
        return HybridConfig.carried(configure({"LVLLM_SHARE_EXPERTS": "1"}, **arguments))

    monkeypatch.setattr(holder, "PREFIX", banks.PREFIX)
    plain = configure({"LVLLM_SHARE_EXPERTS": "1"})
    identity = prepare.shared_identity(plain)
    held = Holder("a/model", lambda status: None)
    # The process that loads for a bank does not ask it.
    with monkeypatch.context() as patch:
        patch.setenv(banks.LOADS_FOR, held.name)
        assert built().bank == held.name
    # A server that starts together with the bank waits until that knows what it will hold.
    loads = {"loads": sharing.name_of(identity), "ranks": 2, "identity": identity}
    Timer(0.2, banks.tell, (held.name, loads)).start()
    assert built().shared_experts == loads["loads"]
    assert built(max_num_batched_tokens=512).bank is None
    for arguments, differs in (
        ({"tensor_parallel_size": 2}, "tensor-parallel-size is 1 there and 2 here"),
        ({"dtype": "float16"}, r"dtype is torch\.bfloat16 there and torch\.float16 here"),
        ({"hf_overrides": {"num_experts_per_tok": 1}}, "config.json .* differs"),
    ):
        with pytest.raises(LvllmError, match=rf"of process {os.getpid()}, .* a/model.*{differs}\."):
            built(**arguments)
    with pytest.raises(LvllmError, match="LVLLM_MOE_USE_WEIGHT is KEEP there and INT4 here"):
        configure({"LVLLM_MOE_USE_WEIGHT": "INT4"})
    held.close()
    assert built().shared_experts is not None  # Without any bank, a server loads by itself.
    other = Holder("another/model", lambda status: None)
    another = dict.fromkeys(identity, "another")
    banks.tell(other.name, {"loads": "another", "ranks": 1, "identity": another})
    assert built().shared_experts is not None  # So it does where a bank holds another model.
    other.close()


def test_a_prefill_engine(configure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoding engine gets the connector, and no GPU offload. The prefill engine's settings
    travel in the connector's. The two engines share experts with each other and with no other
    server.
    """
    offload = {
        "LVLLM_ACCELERATOR": "host",
        "LVLLM_GPU_PREFETCH_WINDOW": "1",
        "LVLLM_GPU_PREFILL_MIN_BATCH_SIZE": "96",
        "LVLLM_GPU_EXPERT_CACHE": "1",
    }
    built = configure({"LVLLM_PREFILL_ENGINE": "auto", **offload})
    decoding = HybridConfig.model_validate(built.additional_config[RESOLVED])
    given = built.kv_transfer_config.kv_connector_extra_config
    prefilling = HybridConfig.model_validate(given["prefill"])
    assert (given["min_tokens"], given["gpu"]) == (96, None)
    assert (decoding.gpu_prefetch_window, decoding.gpu_prefill_min_batch_size) == (0, 0)
    assert (prefilling.gpu_prefetch_window, prefilling.gpu_prefill_min_batch_size) == (1, 96)
    assert (decoding.gpu_expert_cache, prefilling.gpu_expert_cache) == ((1 << 30,), (0,))
    assert decoding.shared_experts == prefilling.shared_experts
    assert str(decoding.shared_experts).endswith(f"/{os.getpid()}")
    shared = configure({"LVLLM_SHARE_EXPERTS": "1"}).additional_config[RESOLVED]["shared_experts"]
    assert decoding.shared_experts == f"{shared}/{os.getpid()}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"tensor_parallel_size": 2},
            "an engine of 2 workers hands nothing over yet",
        ),
        ({"load_format": "dummy"}, "it needs load-format .*; allowed is 0"),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "kv-transfer-config names a connector already",
        ),
        (
            {"distributed_executor_backend": "external_launcher"},
            "distributed-executor-backend='external_launcher' is neither 'mp' nor 'uni'",
        ),
    ],
)
def test_configurations_that_a_prefill_engine_cannot_serve(
    configure: Any, arguments: Any, message: str
) -> None:
    if "kv_transfer_config" in arguments:
        from vllm.config import KVTransferConfig

        given = arguments["kv_transfer_config"]
        arguments = {"kv_transfer_config": KVTransferConfig(**given)}
    with pytest.raises(LvllmError, match=f"LVLLM_PREFILL_ENGINE='64': .*{message}"):
        configure({"LVLLM_PREFILL_ENGINE": "64"}, **arguments)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"experts": 0}, "M has no routed experts to share"),
        ({"runner_type": "pooling"}, "M does not generate"),
        ({"is_hybrid": True}, "M has layers whose state is not keys and values by token"),
        ({"is_encoder_decoder": True}, "M has layers whose state is not keys and values by token"),
        ({"enable_sleep_mode": True}, "enable-sleep-mode=True would end one engine's sleep alone"),
        ({"draft": "mtp"}, "the draft of method 'mtp' has keys and values of its own"),
        ({"draft": "ngram"}, None),
    ],
)
def test_models_that_a_prefill_engine_cannot_serve(fields: Any, message: str | None) -> None:
    nothing = ("is_hybrid", "has_inner_state", "is_attention_free", "is_encoder_decoder")
    experts, draft = fields.pop("experts", 8), fields.pop("draft", None)
    model: dict[str, Any] = dict.fromkeys((*nothing, "enable_sleep_mode"), False)
    model |= {"model": "M", "runner_type": "generate", "max_model_len": 4096}
    vllm_config = SimpleNamespace(
        model_config=SimpleNamespace(**model | fields, get_num_experts=lambda: experts),
        parallel_config=SimpleNamespace(
            world_size=1, data_parallel_size=1, distributed_executor_backend="uni"
        ),
        speculative_config=draft and SimpleNamespace(method=draft),
        kv_transfer_config=None,
    )
    settings = resolve({"LVLLM_PREFILL_ENGINE": "auto"}, None)
    if message is None:
        assert prefill.check(settings, "none", vllm_config) == PrefillEngine(512, None)
        measured = {"LVLLM_PREFILL_ENGINE": "auto", "LVLLM_GPU_PREFILL_MIN_BATCH_SIZE": "auto"}
        settings = resolve(measured, None)
        assert prefill.check(settings, "host", vllm_config) == PrefillEngine(512, None)
        return
    with pytest.raises(variables.SettingError, match=f"'auto': {message}; allowed is 0"):
        prefill.check(settings, "none", vllm_config)


def test_the_prefill_engines_gpu(configure: Any) -> None:
    built = configure()
    given = {"LVLLM_PREFILL_ENGINE": "64", "LVLLM_PREFILL_ENGINE_GPU": "3"}
    settings = resolve(given, None)
    with pytest.raises(
        variables.SettingError, match="GPU='3': no engine runs on a GPU; allowed is em"
    ):
        prefill.check(settings, "none", built)
    assert prefill.check(settings, "cuda", built) == PrefillEngine(64, 3)
    resolved = HybridConfig.model_validate(built.additional_config[RESOLVED])
    beside = resolved.model_copy(update={"accelerator": "cuda"})
    built.cache_config.gpu_memory_utilization = 0.9
    prefill.configure(built, PrefillEngine(64, 3), beside)
    assert built.cache_config.gpu_memory_utilization == 0.9
    prefill.configure(built, PrefillEngine(64, None), beside)
    assert built.cache_config.gpu_memory_utilization == 0.45


def test_memory_of_both_engines(configure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prefill engine needs the KV cache of the largest prompt twice.

    Its size is 3 layers x keys and values x 2 heads x 32 elements x 2 bytes x 128 tokens.
    """
    kv_cache = 2 * 3 * 2 * 2 * 32 * 2 * 128
    others = 1 << 30
    plain = memory_plan._need_of
    monkeypatch.setattr(
        memory_plan, "_need_of", lambda *given: replace(cast(Any, plain(*given)), others=others)
    )
    monkeypatch.setattr(memory_plan.bank, "available_bytes", lambda: 2 * others - 1)
    with pytest.raises(LvllmError) as caught:
        configure({"LVLLM_PREFILL_ENGINE": "64"}, kv_cache_memory_bytes=1 << 20)
    expected = memory_plan.gib(others + kv_cache)
    assert f"KV cache 0.00 GiB, prefill engine {expected})" in str(caught.value)
    assert str(caught.value).endswith(": LVLLM_PREFILL_ENGINE=0 makes it fit")
    configure({"LVLLM_PREFILL_ENGINE": "0"}, kv_cache_memory_bytes=1 << 20)


@pytest.mark.skipif(CPUS < 2, reason="needs two CPUs")
def test_ranks_divide_the_cpus(configure: Any) -> None:
    built = configure(tensor_parallel_size=2)
    resolved = HybridConfig.model_validate(built.additional_config[RESOLVED])
    first, second = resolved.engine_cpus
    assert not set(first) & set(second)
