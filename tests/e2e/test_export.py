"""Every format that `lvllm export` writes, loaded by LvLLM, by transformers and by stock vLLM.

The reference is transformers in float32 on the values that the exported codes and scales mean.
"""

import importlib
import json
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from lvllm.export import FORMATS, FormatRules, export
from tests.e2e import reference
from tests.e2e.generate import ONE_PROCESS, generate
from tests.e2e.test_exactness import Case, check_against_reference, prompts, vision_case
from tests.models.make import make
from tests.random_layers import dequantise

# No two of these dimensions are equal.
SIZES = {"hidden_size": 160, "moe_intermediate_size": 96, "head_dim": 32}
# The formats whose linear layers are exported in a test, too. vLLM has a kernel for such layers on
# any x86 CPU, and the kernel leaves activations as they are.
LINEARS = ("int4",)
# Families whose checkpoints have all experts of a layer in one tensor. Each is exported in one
# format.
FUSED = {
    "qwen3_vl_moe": "int8",
    "qwen3_5_moe": "fp8",
    "gemma4": "int4",
    "gemma4_linears": "int4",
}
# Exports by rules, with the checkpoint that they begin with. Layer 1 of the Qwen3-MoE is dense.
RULES = {
    "by_layers": (
        "qwen3_moe",
        [
            {r"layers\.0\.mlp\.experts": "nvfp4"},
            {r"experts": "fp8"},
            {r"layers\.0\.self_attn": "keep"},
            {r"self_attn|layers\.1\.mlp": "int4"},
        ],
    ),
    "experts_and_attention": (
        "qwen3_moe",
        [{r"experts": "int8"}, {r"layers\.1\.": "keep"}, {r"self_attn": "int4"}],
    ),
    "fused_by_layers": (
        "qwen3_5_moe",
        [
            {r"layers\.0\..*\.experts": "keep"},
            {r"layers\.3\..*\.experts": "nvfp4"},
            {r"\.experts\.": "int8"},
        ],
    ),
}
SEEING = ("qwen3_vl_moe", "qwen3_5_moe")
"""The families in FUSED that are asked about pictures, too."""


def values_of(exported: Path, plain: Path, out: Path) -> Path:
    """Write a float32 checkpoint with the values that the exported codes and scales mean.

    It has the tensors of `plain`. Each must be within the format's error of the one in `plain`.
    """
    tensors = load_file(exported / "model.safetensors")

    def value(name: str) -> torch.Tensor:
        stem = name.removesuffix(".weight")
        data = tensors.pop(f"{stem}.weight_packed" if name not in tensors else name)
        scale = tensors.pop(f"{stem}.weight_scale", None)
        return data.float() if scale is None else meaning(data, scale, tensors, stem)

    values = {}
    for name, stored in load_file(plain / "model.safetensors").items():
        if match := re.fullmatch(r"(.*\.experts)\.(gate_up|down)_proj", name):
            rows = [f"{part}_proj.weight" for part in match[2].split("_")]
            values[name] = torch.stack(
                [
                    torch.cat([value(f"{match[1]}.{expert}.{row}") for row in rows])
                    for expert in range(len(stored))
                ]
            )
            if values[name].shape != stored.shape:
                values[name] = values[name].transpose(1, 2).contiguous()
        else:
            values[name] = value(name)
        assert (values[name] - stored.float()).norm() <= 0.15 * stored.float().norm()
    assert all(re.search(r"_(shape|global_scale)$", name) for name in tensors), "nothing else"
    shutil.copytree(plain, out)
    save_file(values, out / "model.safetensors", {"format": "pt"})
    return out


def meaning(
    data: torch.Tensor, scale: torch.Tensor, tensors: dict[str, torch.Tensor], stem: str
) -> torch.Tensor:
    """The float32 values [N, K] of one weight, by the definitions of the formats."""
    if data.dtype == torch.float8_e4m3fn:
        return data.float() * scale.float()
    if data.dtype == torch.int32 and scale.shape[1] == 1:
        return (data.view(torch.uint8).float() - 128) * scale.float()
    if data.dtype == torch.int32:
        return dequantise("int4", data.view(torch.uint8)[None], scale[None], group_size=32)[0]
    if scale.dtype == torch.uint8:
        return dequantise("mxfp4", data[None], scale[None])[0]
    by_all = 1 / tensors[f"{stem}.weight_global_scale"]
    return dequantise("nvfp4", data[None], scale[None], global_scale=by_all)[0]


def exported_case(plain: Case, name: str, format: str | FormatRules, tmp: Path) -> Case:
    """Export the checkpoint of the case `plain`; return a case with the exported checkpoint."""
    folder = tmp / name
    export(plain.checkpoint, folder, format=format, linears="linears" in name, quiet=True)
    values = values_of(folder, plain.checkpoint, tmp / f"{name}_values")
    return replace(plain, checkpoint=folder, values=values, format=str(format))


def fused_case(family: str, seed: int, tmp: Path) -> Case:
    """Make a model of the family. If SEEING has the family, its prompts have pictures."""
    if family in SEEING:
        return vision_case(family, seed, tmp)
    folder = make(family, tmp / f"{family}-plain", seed, moe_intermediate_size=96)
    return Case(family, folder, folder, prompts(seed))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """Every exported case, with the answers of LvLLM.

    The names are those of the formats, of the formats with "_linears" for those whose linear layers
    are exported, too, of the families with fused experts, and of RULES.
    """
    tmp = tmp_path_factory.mktemp("exported")
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    folder = make("qwen3_moe", tmp / "plain", seed, **SIZES)
    plain = Case("qwen3_moe", folder, folder, prompts(seed))
    names = {name: name for name in FORMATS} | {f"{name}_linears": name for name in LINEARS}
    cases = {name: exported_case(plain, name, format, tmp) for name, format in names.items()}
    made: dict[str, Case] = {}
    for name, format in FUSED.items():
        family = name.removesuffix("_linears")
        made[family] = made.get(family) or fused_case(family, seed, tmp)
        cases[name] = exported_case(made[family], name, format, tmp)
    for name, (family, rules) in RULES.items():
        cases[name] = exported_case(
            made.get(family, plain), name, FormatRules.model_validate(rules), tmp
        )
    jobs = [case.job for case in cases.values()]
    for case, answers in zip(cases.values(), generate(jobs, environment=ONE_PROCESS), strict=True):
        case.answers = answers
    return cases


@pytest.mark.parametrize(
    "name", [*FORMATS, *(f"{format}_linears" for format in LINEARS), *FUSED, *RULES]
)
def test_lvllm(name: str, exported: dict[str, Case]) -> None:
    case = exported[name]
    check_against_reference(case.values, case.asked, case.answers, case.picture)


def check_transformers(case: Case, meant: Any) -> None:
    """Check that transformers computes from the exported checkpoint what `meant` computes.

    transformers rounds the values that the codes mean to bfloat16.
    """
    prompt = [5, 9, 100, 200, 3]
    expected = reference.logprobs(meant, prompt, prompt)
    without = reference.logprobs(reference.without_experts(meant), prompt, prompt)
    assert (without - expected).abs().max() > 0.5
    got = reference.logprobs(reference.load(case.checkpoint), prompt, prompt)
    # The rounding may send a token that is nearly undecided to another expert.
    assert ((got - expected).abs().amax(dim=1) < 0.05).float().mean() >= 0.6


@pytest.mark.parametrize(
    "name", ["int4", "fp8", "int8", "mxfp4", "qwen3_5_moe", "experts_and_attention"]
)
def test_transformers(name: str, exported: dict[str, Case]) -> None:
    """transformers unpacks the experts into bfloat16 while it loads them.

    nvfp4 is missing here, because transformers 5.19 leaves the global scale of its experts out. It
    takes one format for the experts of all layers.
    """
    case = exported[name]
    check_transformers(case, reference.load(case.values))


@pytest.mark.parametrize(
    ("name", "model_type", "experts"),
    [
        ("qwen3_vl_moe", "qwen3_vl_moe", "mlp.experts"),
        ("gemma4", "gemma4_text", "experts"),
        ("gemma4_linears", "gemma4_text", "experts"),
    ],
)
def test_transformers_with_the_mapping_of_the_docs(
    name: str,
    model_type: str,
    experts: str,
    exported: dict[str, Case],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the mapping of names from the docs, transformers loads these families, too.

    Without it, transformers 5.19 looks for their experts in one tensor only.
    """
    case = exported[name]
    meant = reference.load(case.values)
    monkeypatch.setattr(conversion_mapping, "_checkpoint_conversion_mapping_cache", None)
    monkeypatch.setattr(conversion_mapping, "USER_REGISTERED_MAPPINGS", set())
    conversion_mapping.register_checkpoint_conversion_mapping(
        model_type,
        [
            WeightConverter(
                [f"{experts}.*.gate_proj.weight", f"{experts}.*.up_proj.weight"],
                f"{experts}.gate_up_proj",
                operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
            ),
            WeightConverter(
                f"{experts}.*.down_proj.weight",
                f"{experts}.down_proj",
                operations=[MergeModulelist(dim=0)],
            ),
        ],
        overwrite=True,
    )
    check_transformers(case, meant)


METHODS = {
    "int4": "compressed_tensors_moe_wna16.CompressedTensorsWNA16MoEMethod",
    "fp8": "compressed_tensors_moe_w8a8_fp8.CompressedTensorsW8A8Fp8MoEMethod",
    "int8": "compressed_tensors_moe_wna16.CompressedTensorsWNA16MoEMethod",
    "mxfp4": "compressed_tensors_moe_w4a4_mxfp4.CompressedTensorsW4A4Mxfp4MoEMethod",
    "nvfp4": "compressed_tensors_moe_w4a4_nvfp4.CompressedTensorsW4A4Nvfp4MoEMethod",
}


def check_method(
    config: Any, experts: str, format: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that stock vLLM's `config` chooses the method of the format for these experts."""
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
        UnquantizedFusedMoEMethod,
    )
    from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors_moe

    class RoutedExperts(torch.nn.Module):
        ckpt_gate_proj_name, ckpt_up_proj_name, ckpt_down_proj_name = (
            "gate_proj",
            "up_proj",
            "down_proj",
        )
        moe_config = None

    method: Any = UnquantizedFusedMoEMethod
    if format is not None:
        module, _, kind = METHODS[format].partition(".")
        method = getattr(
            importlib.import_module(f"{compressed_tensors_moe.__name__}.{module}"), kind
        )
    monkeypatch.setattr(method, "__init__", lambda *args, **kwargs: None)
    found = compressed_tensors_moe.CompressedTensorsMoEMethod.get_moe_method(
        config, RoutedExperts(), experts
    )
    assert type(found) is method


@pytest.mark.parametrize(
    ("name", "layers", "linears"),
    [
        (
            "by_layers",
            {"model.layers.0.mlp": "nvfp4", "model.layers.2.mlp": "fp8"},
            {
                "model.layers.0.self_attn.qkv_proj": None,
                "model.layers.1.self_attn.qkv_proj": "int4",
                "model.layers.1.mlp.gate_up_proj": "int4",
                "model.layers.1.mlp.down_proj": "int4",
                "model.layers.2.self_attn.o_proj": "int4",
                "model.layers.2.mlp.gate": None,
            },
        ),
        (
            "fused_by_layers",
            {
                "language_model.model.layers.0.mlp": None,
                "language_model.model.layers.1.mlp": "int8",
                "language_model.model.layers.3.mlp": "nvfp4",
            },
            {"language_model.model.layers.3.self_attn.qkv_proj": None},
        ),
    ],
)
def test_stock_vllm_finds_each_layers_format(
    name: str,
    layers: dict[str, str | None],
    linears: dict[str, str | None],
    exported: dict[str, Case],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The layers have vLLM's names, which differ from the checkpoint's in Qwen3.5."""
    from vllm.model_executor.layers.quantization import get_quantization_config
    from vllm.model_executor.models.utils import WeightsMapper

    config = json.loads((exported[name].checkpoint / "config.json").read_text())
    section = config["quantization_config"]
    chosen = get_quantization_config("compressed-tensors").from_config(section)
    chosen.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    prefixes = {"model.visual.": "visual.", "model.language_model.": "language_model.model."}
    chosen.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix=prefixes))
    for layer, format in layers.items():
        check_method(chosen, f"{layer}.experts", format, monkeypatch)
    for module, format in linears.items():
        found = chosen.get_scheme_dict(torch.nn.Linear(1, 1), module)
        assert (found and found["weights"].num_bits) == (format and int(format[-1])), module


LEFT = ("self_attn.qkv_proj", "self_attn.o_proj")


@pytest.mark.parametrize(
    ("name", "layer", "experts", "left"),
    [
        *((name, "model.layers.0", "mlp.experts", (*LEFT, "mlp.gate")) for name in FORMATS),
        ("qwen3_vl_moe", "model.language_model.layers.0", "mlp.experts", (*LEFT, "mlp.gate")),
        ("qwen3_5_moe", "model.language_model.layers.3", "mlp.experts", (*LEFT, "mlp.gate")),
        ("gemma4", "model.layers.1", "experts", (*LEFT, "router.proj")),
    ],
)
def test_stock_vllm_has_a_method_for_it(
    name: str,
    layer: str,
    experts: str,
    left: tuple[str, ...],
    exported: dict[str, Case],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stock vLLM chooses the format's method for the experts, and leaves the rest as it is.

    The kernels of vLLM 0.32 for quantised experts need a GPU or AMX, and its methods look for one
    when they are made. So this test only asks what vLLM's configuration chooses.
    """
    from vllm.model_executor.layers.quantization import get_quantization_config

    config = json.loads((exported[name].checkpoint / "config.json").read_text())
    chosen = get_quantization_config("compressed-tensors").from_config(
        config["quantization_config"]
    )
    chosen.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    check_method(chosen, f"{layer}.{experts}", exported[name].format, monkeypatch)
    for module in left:
        assert chosen.get_scheme(torch.nn.Linear(1, 1), f"{layer}.{module}") is None
    with_linears = get_quantization_config("compressed-tensors").from_config(
        config["quantization_config"] | {"ignore": ["lm_head"]}
    )
    with_linears.packed_modules_mapping = chosen.packed_modules_mapping
    assert with_linears.get_scheme_dict(torch.nn.Linear(1, 1), f"{layer}.self_attn.qkv_proj"), (
        "or the test above would pass for any configuration"
    )
