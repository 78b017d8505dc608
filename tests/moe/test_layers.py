"""Single layers of experts: cases that no model of the other tests has.

A layer is built by vLLM's factory, filled through vLLM's loader from a checkpoint's tensors, and
called through vLLM's runner and router.
"""

from collections.abc import Callable, Iterator
from random import randrange
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.compilation.backends import set_model_tag
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.quantization import fp8
from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config

from lvllm.engine import bank
from lvllm.errors import LayerError
from lvllm.moe import activations, resident_method
from lvllm.moe import resident as resident_layers
from lvllm.moe.method import HybridMoEMethod
from lvllm.moe.resident_method import ResidentMoEMethod
from lvllm.settings.configuration import RESOLVED
from lvllm.upstream.quantization_configs import CompressedConfig, GgufConfig, GptqConfig
from tests.random_layers import Layer, Random

EXPERTS, TOPK, HIDDEN, INTERMEDIATE, TOKENS = 5, 2, 96, 72, 19
# The arguments that all layers share.
SIZES: dict[str, Any] = {
    "num_experts": EXPERTS,
    "top_k": TOPK,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "params_dtype": torch.bfloat16,
}
# By activation: the arguments of vLLM's layer, and the arguments of `ExpertLayer` that they become.
LAYERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "silu": ({}, {}),
    "silu_with_limit": (
        {"swiglu_limit": 0.7},
        {"activation": "swigluoai", "swiglu_alpha": 1.0, "swiglu_beta": 0.0, "swiglu_limit": 0.7},
    ),
    "gelu": ({}, {"activation": "gelu"}),
    "gelu_pytorch_tanh": ({}, {"activation": "gelu_tanh"}),
    "swigluoai": ({}, {"activation": "swigluoai", "interleaved": True}),
    "swigluoai_uninterleave": (
        {"swiglu_alpha": 1.3, "swiglu_beta": 0.5, "swiglu_limit": 0.7},
        {"activation": "swigluoai", "swiglu_alpha": 1.3, "swiglu_beta": 0.5, "swiglu_limit": 0.7},
    ),
    "swiglustep": (
        {"swiglu_limit": 0.7},
        {"activation": "swiglustep", "swiglu_limit": 0.7},
    ),
    "relu2_no_mul": ({"ckpt_names": ("up_proj", "down_proj", None)}, {"activation": "relu2"}),
}


def tensors(random: Random, gate: str, up: str | None, bias: bool) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors of one layer's experts, by their names below the layer's name."""
    stored = {}
    for expert in range(EXPERTS):
        for name, rows, columns in (
            (gate, INTERMEDIATE, HIDDEN),
            (up, INTERMEDIATE, HIDDEN),
            ("down_proj", HIDDEN, INTERMEDIATE),
        ):
            if name is None:
                continue
            weight = 1.5 * random.normal(rows, columns) * columns**-0.5
            stored[f"{expert}.{name}.weight"] = weight.bfloat16()
            if bias:
                stored[f"{expert}.{name}.bias"] = random.normal(rows).bfloat16()
    return stored


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str, bias: bool, vllm_config: VllmConfig, request: Any) -> None:
    # Rounding the result to bfloat16 makes an error of 1.7e-3. avx512_bf16 and amx round earlier,
    # too.
    check(name, bias, f"{request.node.name}.mlp.experts", vllm_config, 5e-3)


@pytest.mark.usefixtures("resident", "beyond_vllm")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_resident_layers_on_our_kernels(
    name: str, bias: bool, vllm_config: VllmConfig, request: Any
) -> None:
    """The host's memory has held them only while they were loaded."""
    before = bank.allocated_bytes()
    # On the stand-in, the sums of w13 and w2 are rounded as well, and relu2 squares the first.
    prefix = f"{request.node.name}.layers.4.mlp.experts"
    layer = check(name, bias, prefix, vllm_config, 7e-3)
    assert isinstance(layer.quant_method, ResidentMoEMethod)
    assert bank.allocated_bytes() == before


@pytest.fixture
def beyond_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM has no kernels for resident layers."""

    def refuse(*arguments: object) -> None:
        raise NotImplementedError("no kernels")

    monkeypatch.setattr(resident_layers, "_upstream_method", refuse)


def check(name: str, bias: bool, prefix: str, vllm_config: VllmConfig, bound: float) -> Any:
    """Load a layer and compare its results with the reference; return it."""
    arguments, expected_arguments = LAYERS[name]
    random = Random(randrange(1 << 30))
    gate, _, up = arguments.get("ckpt_names", ("gate_proj", "down_proj", "up_proj"))
    stored = tensors(random, gate, up, bias)
    with set_current_vllm_config(vllm_config):
        runner = FusedMoEFactory(
            **SIZES,
            activation=name.removesuffix("_with_limit"),
            has_bias=bias,
            prefix=prefix,
            **arguments,
        )
        layer = runner.routed_experts
        loaded = set(layer.load_weights(stored.items()))
        assert loaded == set(dict(layer.named_parameters()))
        layer.quant_method.process_weights_after_loading(layer)
        x = random.normal(TOKENS, HIDDEN).bfloat16()
        logits = random.normal(TOKENS, EXPERTS).bfloat16()
        with set_forward_context(None, vllm_config):
            out = runner(hidden_states=x, router_logits=logits)

    def stacked(names: tuple[str | None, ...], suffix: str) -> torch.Tensor:
        return torch.stack(
            [torch.cat([stored[f"{e}.{n}.{suffix}"] for n in names if n]) for e in range(EXPERTS)]
        )

    of_layer = {
        "format": "bf16",
        "w13": stacked((gate, up), "weight"),
        "w2": stacked(("down_proj",), "weight"),
    }
    if bias:
        of_layer["w13_bias"] = stacked((gate, up), "bias")
        of_layer["w2_bias"] = stacked(("down_proj",), "bias")
    weights, ids = logits.float().softmax(-1).topk(TOPK)
    weights = weights / weights.sum(-1, keepdim=True)
    expected = Layer(of_layer | expected_arguments).reference(x, ids, weights)
    assert (out.float() - expected).norm() <= bound * expected.norm()
    return layer


def test_no_expert_is_read_for_those_without_weights(vllm_config: VllmConfig) -> None:
    """vLLM leaves expert 0 in their places. It is all NaN here, and no token chooses it itself."""
    random, zero, scale = Random(randrange(1 << 30)), 4, 1.5
    stored = tensors(random, "gate_proj", "up_proj", bias=False)
    bias = torch.rand(EXPERTS + zero) / 4
    bias[0] = -2
    with set_current_vllm_config(vllm_config):
        runner = FusedMoEFactory(
            **SIZES,
            renormalize=False,
            routed_scaling_factor=scale,
            zero_expert_type="identity",
            e_score_correction_bias=torch.nn.Parameter(bias),
            prefix="without_weights.mlp.experts",
        )
        layer = runner.routed_experts
        unread = {name: tensor * torch.nan for name, tensor in stored.items() if name[0] == "0"}
        assert len(set(layer.load_weights((stored | unread).items()))) == 2
        layer.quant_method.process_weights_after_loading(layer)
        x = random.normal(TOKENS, HIDDEN).bfloat16()
        logits = random.normal(TOKENS, EXPERTS + zero)
        with set_forward_context(None, vllm_config), torch.no_grad():
            out = runner(hidden_states=x, router_logits=logits)
    scores = logits.softmax(-1)
    ids = (scores + bias).topk(TOPK).indices
    weights = scores.gather(1, ids) * scale
    without = ids >= EXPERTS
    assert without.any()
    assert not without.all()
    names = [[f"{e}.{n}.weight" for n in ("gate_proj", "up_proj")] for e in range(EXPERTS)]
    w13 = torch.stack([torch.cat([stored[name] for name in pair]) for pair in names])
    w2 = torch.stack([stored[f"{e}.down_proj.weight"] for e in range(EXPERTS)])
    expected = Layer({"format": "bf16", "w13": w13, "w2": w2}).reference(x, ids, weights)
    expected += x.float() * weights.masked_fill(~without, 0).sum(-1, keepdim=True)
    assert (out.float() - expected).norm() <= 5e-3 * expected.norm()


def make_experts(prefix: str, **arguments: Any) -> Any:
    return FusedMoEFactory(prefix=prefix, **(SIZES | arguments)).routed_experts


@pytest.mark.usefixtures("vllm_config")  # LvLLM's classes are in the place of vLLM's
def test_layers_outside_an_engine_are_vllms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tools build them with a configuration that has no model, or without any."""
    monkeypatch.setattr(fp8, "select_fp8_moe_backend", lambda **_: (None, None))  # for GPUs only
    with set_current_vllm_config(VllmConfig()):
        first = make_experts("outside.0.mlp.experts")
        with pytest.raises(NotImplementedError, match="is_act_and_mul=False"):
            make_experts(
                "outside.1.mlp.experts",
                activation="relu2_no_mul",
                ckpt_names=("up_proj", "down_proj", None),
            )
    arguments = (torch.bfloat16, first.moe_config, fp8.Fp8Config(True), first.expert_map_manager)
    second = RoutedExperts("outside.2.mlp.experts", *arguments)
    for layer, method in (first, UnquantizedFusedMoEMethod), (second, fp8.Fp8MoEMethod):
        assert isinstance(layer.quant_method, method)
        weight = torch.randn(INTERMEDIATE, HIDDEN).to(layer.w13_weight.dtype)
        layer.weight_loader(layer.w13_weight, weight, "w13_weight", "w3", EXPERTS - 1)
        assert torch.equal(layer.w13_weight[-1, INTERMEDIATE:].float(), weight.float())


@pytest.mark.parametrize("bias", [False, True])
def test_experts_of_a_model_that_is_built_on_a_gpu(bias: bool, vllm_config: VllmConfig) -> None:
    """The experts lie in host memory all the same. The meta device stands for the GPU here."""
    with set_current_vllm_config(vllm_config), torch.device("meta"):
        layer = make_experts(f"built.{bias}.mlp.experts", has_bias=bias)
        assert torch.empty(1).is_meta
    devices = {name: tensor.device.type for name, tensor in layer.named_parameters()}
    assert len(devices) == 2 + 2 * bias
    assert set(devices.values()) == {"cpu"}


@pytest.fixture
def resident(vllm_config: VllmConfig) -> Iterator[None]:
    """The layers 2 and 4 are resident; the accelerator is the host."""
    found = vllm_config.additional_config[RESOLVED]
    offloaded = {"accelerator": "host", "gpu_resident_moe_layers": [2, 4]}
    vllm_config.additional_config[RESOLVED] = found | offloaded
    with set_current_vllm_config(vllm_config):
        yield
    vllm_config.additional_config[RESOLVED] = found


@pytest.mark.usefixtures("resident")
def test_resident_layers_are_left_to_vllm() -> None:
    """They take none of the engine's memory. All layers of a draft are resident."""
    before = bank.allocated_bytes()
    for prefix in ("language_model.model.layers.2.mlp.experts", "backbone.layers.4.mixer.experts"):
        layer = make_experts(prefix)
        assert type(layer.quant_method) is UnquantizedFusedMoEMethod
    with set_model_tag("eagle_head"):
        draft = make_experts("model.layers.3.mlp.experts")
    assert type(draft.quant_method) is UnquantizedFusedMoEMethod
    assert bank.allocated_bytes() == before
    layer = make_experts("again.layers.3.mlp.experts")
    assert isinstance(layer.quant_method, HybridMoEMethod)
    assert bank.allocated_bytes() > before


# vLLM has no kernels for these experts on its CPU platform, or none at all.
ORDERED = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "actorder": "group"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": True}
BEYOND_VLLM: dict[str, Callable[[], dict[str, Any]]] = {
    "without_gate": lambda: {"activation": "relu2_no_mul", "ckpt_names": ("up", "down", None)},
    "nvfp4": lambda: {"quant_config": ModelOptNvFp4Config("NVFP4", True)},
    "gptq": lambda: {"quant_config": GptqConfig.from_config(GPTQ)},
    "gptq_zeros": lambda: {
        "quant_config": GptqConfig.from_config(GPTQ | {"desc_act": False, "sym": False})
    },
    "gguf": lambda: {"quant_config": GgufConfig({"experts": {"4": ["Q8_0", "Q8_0", "Q4_0"]}})},
    "compressed": lambda: {
        "quant_config": CompressedConfig.from_config(
            {
                "format": "pack-quantized",
                "config_groups": {"group_0": {"targets": ["Linear"], "weights": ORDERED}},
            }
        )
    },
}


@pytest.mark.usefixtures("resident")
@pytest.mark.parametrize("why", BEYOND_VLLM)
def test_resident_layers_that_vllm_cannot_compute(why: str) -> None:
    layer = make_experts(f"{why}.layers.4.mlp.experts", intermediate_size=96, **BEYOND_VLLM[why]())
    assert isinstance(layer.quant_method, ResidentMoEMethod)


@pytest.mark.usefixtures("resident")
def test_resident_layers_that_nobody_can_compute() -> None:
    prefix = "nobodys.layers.4.mlp.experts"
    with pytest.raises(ValueError, match=r"where they are to be resident: ") as caught:
        make_experts(prefix, activation="silu_no_mul", ckpt_names=("up", "down", None))
    said = str(caught.value)
    assert said.startswith(f"{prefix}: vLLM cannot compute these experts on cpu")
    assert "its kernels need a gate; nor can LvLLM: " in said
    assert "activation 'silu_no_mul' is not supported" in said
    assert said.endswith("; leave 4 out of LVLLM_GPU_RESIDENT_MOE_LAYERS")


@pytest.mark.usefixtures("resident", "beyond_vllm")
def test_resident_layers_that_a_graph_could_not_hold(
    vllm_config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("33 weights")

    monkeypatch.setattr(resident_method, "ResidentLayer", refuse)
    with pytest.raises(LayerError) as caught:
        check("silu", False, "odd.layers.4.mlp.experts", vllm_config, 1)
    wanted = "odd.layers.4.mlp.experts: 33 weights; leave 4 out of LVLLM_GPU_RESIDENT_MOE_LAYERS"
    assert str(caught.value) == wanted


@pytest.mark.usefixtures("resident")
@pytest.mark.parametrize("wanted", ["expert parallelism", "models with LoRA"])
def test_what_vllms_kernels_for_cpus_lack(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would read beyond the end of the weights that a rank holds, or want Triton."""
    taken: list[str] = []
    monkeypatch.setattr(resident_layers, "ResidentMoEMethod", lambda *_: taken.append(wanted))
    moe: Any = SimpleNamespace(
        is_act_and_mul=True,
        moe_parallel_config=SimpleNamespace(use_ep=wanted == "expert parallelism"),
        is_lora_enabled=wanted == "models with LoRA",
    )
    resident_layers.resident_method(None, "model.layers.4.mlp.experts", None, moe)
    assert taken == [wanted]


@pytest.mark.parametrize(
    ("name", "limit", "message"),
    [
        ("situ", None, "activation 'situ' is not supported; supported are silu"),
        ("silu_no_mul", None, "activation 'silu_no_mul' is not supported"),
        ("relu2", None, "activation 'relu2' is not supported"),
        ("gelu", 7.0, "activation 'gelu' with swiglu_limit 7.0 is not supported"),
        ("swigluoai_uninterleave", None, "'swigluoai_uninterleave' is not supported"),
    ],
)
def test_unsupported_activations_are_refused(name: str, limit: float | None, message: str) -> None:
    moe = SimpleNamespace(
        activation=MoEActivation.from_str(name),
        swiglu_alpha=None,
        swiglu_beta=None,
        swiglu_limit=limit,
    )
    with pytest.raises(ValueError, match=message) as caught:
        activations.arguments(moe)
    assert "\n" not in str(caught.value)


def test_a_complete_layer_keeps_only_the_engines_tensors(vllm_config: VllmConfig) -> None:
    """The engine keeps codes and 16-bit scales; the parameters that were loaded are freed."""
    how = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    groups = {"group_0": {"targets": ["Linear"], "weights": how}}
    random, sizes = Random(randrange(1 << 30)), {"gate_proj": 64, "up_proj": 64, "down_proj": 96}
    stored = {}
    for expert in range(EXPERTS):
        for name, rows in sizes.items():
            columns = 64 if name == "down_proj" else 96
            key = f"{expert}.{name}.weight"
            stored[f"{key}_packed"] = random.integers(-(1 << 31), 1 << 31, rows, columns // 8).int()
            stored[f"{key}_scale"] = random.uniform(0.1, 1, rows, columns // 32).bfloat16()
            stored[f"{key}_shape"] = torch.tensor([rows, columns])
    with set_current_vllm_config(vllm_config):
        layer = FusedMoEFactory(
            num_experts=EXPERTS,
            top_k=TOPK,
            hidden_size=96,
            intermediate_size=64,
            params_dtype=torch.bfloat16,
            prefix="model.layers.1.mlp.experts",
            quant_config=CompressedConfig.from_config(
                {"format": "pack-quantized", "config_groups": groups}
            ),
        ).routed_experts
        list(layer.load_weights(stored.items()))
        # The weights' shapes are optional parameters, which may be loaded after all others.
        loaded_into = {name for name, data in layer.named_parameters() if data.numel()}
        assert loaded_into == {"w13_weight_shape", "w2_weight_shape"}
        kept = layer.engine.tensors
        assert set(kept) == {"w13", "w2", "w13_scale", "w2_scale"}
        for scale in (kept["w13_scale"], kept["w2_scale"]):
            assert scale.dtype == torch.bfloat16
            assert scale.untyped_storage().nbytes() == scale.nbytes
        # Tensors that are loaded again are ignored, since the engine has reordered the weights.
        codes = kept["w13"].clone()
        list(layer.load_weights(stored.items()))
        assert torch.equal(layer.engine.tensors["w13"], codes)
        layer.quant_method.process_weights_after_loading(layer)
