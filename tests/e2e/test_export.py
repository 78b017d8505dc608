"""Every format that `lvllm export` writes, loaded by LvLLM, by transformers and by stock vLLM.

The reference is transformers in float32 on the values that the exported codes and scales mean.
"""

import importlib
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lvllm.export import FORMATS, export
from tests.e2e import reference
from tests.e2e.generate import ONE_PROCESS, Answers, generate
from tests.e2e.test_exactness import Prompts, check_against_reference, prompts
from tests.experts import dequantise
from tests.models.make import make

Case = tuple[Path, Path, Prompts, Answers]
# Dimensions that no two have in common.
SIZES = {"hidden_size": 160, "moe_intermediate_size": 96, "head_dim": 32}
# vLLM has a kernel for such linear layers on any x86 CPU, and it leaves activations as they are.
LINEARS = ("int4",)


def values_of(exported: Path, plain: Path, out: Path) -> Path:
    """What the exported codes and scales mean, as a float32 checkpoint."""
    tensors = load_file(exported / "model.safetensors")
    values = {}
    for name, data in tensors.items():
        stem, _, suffix = name.rpartition(".")
        if suffix in ("weight", "weight_packed"):
            scale = tensors.get(f"{stem}.weight_scale")
            values[f"{stem}.weight"] = (
                data.float() if scale is None else meaning(data, scale, tensors, stem)
            )
    shutil.copytree(plain, out)
    save_file(values, out / "model.safetensors", {"format": "pt"})
    return out


def meaning(
    data: torch.Tensor, scale: torch.Tensor, tensors: dict[str, torch.Tensor], stem: str
) -> torch.Tensor:
    """float32 [N, K] of one weight, by the definitions of the formats."""
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


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """By format, and by format with its linear layers: the export, its values, LvLLM's answers.
    One process of vLLM runs them all.
    """
    tmp = tmp_path_factory.mktemp("exported")
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    plain = make("qwen3_moe", tmp / "plain", seed, **SIZES)
    asked = prompts(seed)
    folders = {}
    for name in (*FORMATS, *(f"{format}_linears" for format in LINEARS)):
        format, _, linears = name.partition("_")
        export(plain, tmp / name, format=format, linears=bool(linears), quiet=True)
        folders[name] = (tmp / name, values_of(tmp / name, plain, tmp / f"{name}_values"))
    jobs = [
        {"model": str(folder), "prompts": asked, "max_tokens": 12} for folder, _ in folders.values()
    ]
    answers = generate(jobs, environment=ONE_PROCESS)
    return {
        name: (*both, asked, answer)
        for (name, both), answer in zip(folders.items(), answers, strict=True)
    }


@pytest.mark.parametrize("name", [*FORMATS, *(f"{format}_linears" for format in LINEARS)])
def test_lvllm(name: str, exported: dict[str, Case]) -> None:
    _, values, asked, answers = exported[name]
    check_against_reference(values, asked, answers)


@pytest.mark.parametrize("format", ["int4", "fp8", "int8", "mxfp4"])
def test_transformers(format: str, exported: dict[str, Case]) -> None:
    """It unpacks experts while it loads, into bfloat16. Of nvfp4 ones, transformers 5.19 leaves the
    global scale out.
    """
    folder, values, _, _ = exported[format]
    prompt = [5, 9, 100, 200, 3]
    loaded, meant = reference.load(folder), reference.load(values)
    got = reference.logprobs(loaded, prompt, prompt)
    expected = reference.logprobs(meant, prompt, prompt)
    assert (got - expected).abs().max() < 0.05
    without = reference.logprobs(reference.without_experts(meant), prompt, prompt)
    assert (without - expected).abs().max() > 0.5


METHODS = {
    "int4": "compressed_tensors_moe_wna16.CompressedTensorsWNA16MoEMethod",
    "fp8": "compressed_tensors_moe_w8a8_fp8.CompressedTensorsW8A8Fp8MoEMethod",
    "int8": "compressed_tensors_moe_wna16.CompressedTensorsWNA16MoEMethod",
    "mxfp4": "compressed_tensors_moe_w4a4_mxfp4.CompressedTensorsW4A4Mxfp4MoEMethod",
    "nvfp4": "compressed_tensors_moe_w4a4_nvfp4.CompressedTensorsW4A4Nvfp4MoEMethod",
}


@pytest.mark.parametrize("format", FORMATS)
def test_stock_vllm_has_a_method_for_it(
    format: str, exported: dict[str, Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM 0.32's own kernels for quantised experts want a GPU, or AMX, and its methods look for
    one when they are made. So this asks which method its configuration chooses for the experts, and
    whether it leaves the rest alone.
    """
    from vllm.model_executor.layers.quantization import get_quantization_config
    from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors_moe

    class RoutedExperts(torch.nn.Module):
        ckpt_gate_proj_name, ckpt_up_proj_name, ckpt_down_proj_name = (
            "gate_proj",
            "up_proj",
            "down_proj",
        )
        moe_config = None

    config = json.loads((exported[format][0] / "config.json").read_text())
    chosen = get_quantization_config("compressed-tensors").from_config(
        config["quantization_config"]
    )
    chosen.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    module, _, name = METHODS[format].partition(".")
    method = getattr(importlib.import_module(f"{compressed_tensors_moe.__name__}.{module}"), name)
    monkeypatch.setattr(method, "__init__", lambda *args, **kwargs: None)
    found = compressed_tensors_moe.CompressedTensorsMoEMethod.get_moe_method(
        chosen, RoutedExperts(), "model.layers.0.mlp.experts"
    )
    assert type(found) is method
    for left in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate"):
        assert chosen.get_scheme(torch.nn.Linear(1, 1), f"model.layers.0.{left}") is None
    with_linears = get_quantization_config("compressed-tensors").from_config(
        config["quantization_config"] | {"ignore": ["lm_head"]}
    )
    with_linears.packed_modules_mapping = chosen.packed_modules_mapping
    assert with_linears.get_scheme_dict(
        torch.nn.Linear(1, 1), "model.layers.0.self_attn.qkv_proj"
    ), "or the test above would pass for any configuration"
