"""What config.json and tensor names say of each format, without vLLM and as vLLM sees it."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe.routed_experts import FusedMoeWeightScaleSupported
from vllm.model_executor.layers.quantization import get_quantization_config

from lvllm import formats
from lvllm.checkpoint import Checkpoint
from lvllm.formats import describe, only_4_bit
from lvllm.upstream import quantization_configs
from tests.models.quantize import MIXED, SCHEMES

EXPERT = "model.layers.0.mlp.experts.0.down_proj"
ROWS, COLUMNS = 128, 256


def config(name: str) -> dict[str, Any]:
    return {**SCHEMES, **MIXED}[name].config


@pytest.mark.parametrize(
    ("name", "more", "only"),
    [
        ("awq", {"modules_to_not_convert": ["gate", "lm_head", "model.layers.0"]}, False),
        ("awq", {"modules_to_not_convert": ["gate", "lm_head", "model.layers.1"]}, True),
        ("gptq_int4", {}, True),
        ("gptq_int4_act_order", {}, False),
        ("gptq_int8", {}, False),
        ("gptq_int4", {"dynamic": {r"-:.*layers\.2\.mlp.*": {}}}, False),
        ("gptq_int4", {"dynamic": {r"+:.*layers\.2\.mlp\.experts.*": {"bits": 8}}}, False),
        (
            "gptq_int4",
            {"dynamic": {r"+:.*layers\.2\..*": {"group_size": 32}, r"+:.*experts.*": {"bits": 8}}},
            False,
        ),
        (
            "gptq_int8",
            {"dynamic": {r"+:.*experts\..*": {"bits": 4}, r"+:.*experts.*": {"bits": 8}}},
            True,
        ),
        ("auto_round", {}, True),
        ("auto_round", {"extra_config": {"model.layers.2.mlp.experts": {"bits": 8}}}, False),
        ("compressed_int4_channels", {}, True),
        ("compressed_int4_groups_of_16", {}, False),
        ("compressed_int4_act_order", {}, False),
        ("compressed_int8", {}, False),
        ("compressed_mxfp4", {"ignore": [r"re:.*mlp.gate$", r"re:.*attn.*", "lm_head"]}, True),
        ("compressed_nvfp4", {"ignore": ["model.layers.0.mlp.experts.0.down_proj"]}, False),
        ("compressed_nvfp4", {"ignore": [r"re:.*layers\.0\..*"]}, False),
        ("compressed_int4_and_fp8", {}, False),
        ("modelopt_nvfp4", {"exclude_modules": ["lm_head", "*.mlp.gate"]}, True),
        ("modelopt_nvfp4", {"exclude_modules": ["model.layers.0.*"]}, False),
        ("modelopt_fp8", {}, False),
        ("fp8_blocks", {}, False),
    ],
)
def test_only_4_bit(name: str, more: dict[str, Any], only: bool) -> None:
    assert only_4_bit(config(name) | more, [0, 2]) == only


def test_gpt_oss() -> None:
    assert only_4_bit({"quant_method": "mxfp4"}, [0])


def test_modelopt_before_it_had_a_section_in_config_json() -> None:
    nested = {"quant_algo": "NVFP4", "exclude_modules": ["model.layers.2.*"]}
    section = {"quant_method": "modelopt_fp4", "quantization": nested}
    assert only_4_bit(section, [0])
    assert not only_4_bit(section, [0, 2])


def vllms_view(section: dict[str, Any]) -> Any:
    """vLLM's configuration of a checkpoint with this section, as it is when LvLLM runs."""
    quantization_configs.register()
    method = section["quant_method"]
    if section.get("quant_algo") == "NVFP4":
        method = "modelopt_fp4"
    found = get_quantization_config({"auto-round": "inc"}.get(method, method))
    return found.from_config(section)


class RoutedExperts(torch.nn.Module):
    """What formats ask of vLLM's layer."""

    ckpt_gate_proj_name, ckpt_up_proj_name = "gate_proj", "up_proj"
    ckpt_down_proj_name = "down_proj"


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_a_descriptor_says_what_vllm_finds(name: str) -> None:
    """Bits, and whether lk computes the experts as they are stored."""
    section = config(name)
    descriptor = describe(section)
    assert descriptor is not None
    with set_current_vllm_config(VllmConfig()):
        quant_config = vllms_view(section)
        found = formats.find(quant_config, RoutedExperts(), "model.layers.0.mlp.experts")
    assert quant_config.get_name() in descriptor.quantizations
    stored = descriptor.of_module(section, EXPERT)
    assert (stored.bits, stored.computable) == (found.bits, found.computable)


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_weights_are_counted(name: str, tmp_path: Path) -> None:
    """The tensors of one projection hold as many weights as it has, whatever the format."""
    stored, _ = SCHEMES[name].quantize(torch.randn(ROWS, COLUMNS))
    tensors = {f"{EXPERT}.{suffix}": data.contiguous() for suffix, data in stored.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    section = config(name)
    descriptor = describe(section)
    assert descriptor is not None
    how = descriptor.of_module(section, EXPERT)
    holding = [
        info
        for info in Checkpoint.open(tmp_path).tensors.values()
        if descriptor.holds_weights(info.name)
    ]
    assert sum(descriptor.weights_in(info, how) for info in holding) == ROWS * COLUMNS


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_scales_are_recognised(name: str) -> None:
    stored, _ = SCHEMES[name].quantize(torch.randn(ROWS, COLUMNS))
    scales = {suffix for suffix in stored if formats.is_weight_scale(f"{EXPERT}.{suffix}")}
    assert scales == {suffix for suffix in stored if "scale" in suffix and "input" not in suffix}
    divisors = {suffix for suffix in stored if formats.is_divisor(f"{EXPERT}.{suffix}")}
    assert divisors == scales & {"weight_global_scale"}


def test_the_kinds_of_scales_are_vllms() -> None:
    """The formats write these names out instead of importing vLLM."""
    kinds = {kind.value for kind in FusedMoeWeightScaleSupported}
    assert kinds == {"tensor", "channel", "group", "block"}


def test_what_is_not_quantised_or_not_known() -> None:
    plain = describe(None)
    assert plain is not None
    assert plain.of_module({}, EXPERT) == formats.Stored(bits=16)
    assert describe({"quant_method": "quark"}) is None
    assert not only_4_bit({"quant_method": "quark"}, [0])
    assert not only_4_bit(None, [0])
    unknown = SimpleNamespace(get_name=lambda: "quark")
    with pytest.raises(ValueError, match=r"^model\.layers\.0: .*'quark' are not supported; .*GPTQ"):
        formats.find(unknown, torch.nn.Module(), "model.layers.0")


WITHOUT_VLLM = """
import json, sys
from pathlib import Path
from lvllm import formats
from lvllm.checkpoint import Checkpoint
from lvllm.machine.memory_need import needed

folder = Path(sys.argv[1])
section = json.loads((folder / "config.json").read_text())["quantization_config"]
formats.only_4_bit(section, [0])
need = needed(Checkpoint.open(folder).tensors, None, layers=1, section=section)
heavy = {"vllm", "transformers", "compressed_tensors"} & set(sys.modules)
print(json.dumps([need.experts_int4, sorted(heavy)]))
"""


def test_a_checkpoint_is_described_without_vllm(tmp_path: Path) -> None:
    stored, _ = SCHEMES["gptq_int4"].quantize(torch.randn(ROWS, COLUMNS))
    tensors = {f"{EXPERT}.{suffix}": data.contiguous() for suffix, data in stored.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    section = {"quantization_config": config("gptq_int4")}
    (tmp_path / "config.json").write_text(json.dumps(section))
    command = [sys.executable, "-c", WITHOUT_VLLM, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == [ROWS * COLUMNS * 9 // 16, []]
