"""Checkpoints whose experts are quantised in the formats that people download.

A reference goes with each: the same values in float32. A scheme quantises one projection of one
expert, [rows, columns]. It returns the checkpoint's tensors by their suffix, and the values that
those tensors mean.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import pack_to_int32
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from lvllm.engine.quantize import int4

Tensors = dict[str, torch.Tensor]
EXPERTS = r"\.experts\.\d+\.(gate_proj|up_proj|down_proj)\.weight$"
FIRST_LAYER = rf"\.layers\.0\.mlp{EXPERTS}"
SECOND_LAYER = rf"\.layers\.1\.mlp{EXPERTS}"
ATTENTION = r"\.self_attn\.[qkvo]_proj\.weight$"
FP8_LARGEST = 448.0


@dataclass(frozen=True)
class Scheme:
    """How experts are quantised, and what config.json says of it."""

    config: dict[str, Any]
    quantize: Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]
    ignored: str | None = "ignored_layers"
    """The key of `config` that lists what is not quantised. None: `config` says it in another way.
    """
    what: str = EXPERTS
    """A pattern for the names of the tensors that are quantised."""
    also: "Scheme | None" = None
    """How other tensors are quantised: `what` and `quantize` of it are used."""


def quantize(folder: Path, scheme: Scheme, out: Path) -> tuple[Path, Path]:
    """Write the quantised checkpoint, and its values in float32; return both folders."""
    quantized, values = out / "quantized", out / "values"
    tensors = load_file(folder / "model.safetensors")
    packed: Tensors = {}
    plain: Tensors = {}
    linear = []
    schemes = (scheme, scheme.also) if scheme.also else (scheme,)
    for name, tensor in tensors.items():
        how = next((one for one in schemes if re.search(one.what, name)), None)
        if how is not None:
            stored, value = how.quantize(tensor.float())
            stem = name.removesuffix(".weight")
            packed |= {f"{stem}.{suffix}": data.contiguous() for suffix, data in stored.items()}
            plain[name] = value
        else:
            packed[name] = tensor
            plain[name] = tensor.float()
            if tensor.dim() == 2:
                linear.append(name.removesuffix(".weight"))
    config = json.loads((folder / "config.json").read_text())
    ignored = {scheme.ignored: linear} if scheme.ignored else {}
    for target, data, changes in (
        (quantized, packed, {"quantization_config": scheme.config | ignored}),
        (values, plain, {}),
    ):
        shutil.copytree(folder, target)
        save_file(data, target / "model.safetensors", {"format": "pt"})
        (target / "config.json").write_text(json.dumps(config | changes))
    return quantized, values


def round_again(values: Path, what: str) -> None:
    """Round these tensors of a float32 checkpoint to FP8 with one scale per tensor, in place."""
    tensors = load_file(values / "model.safetensors")
    for name, tensor in tensors.items():
        if re.search(what, name):
            tensors[name] = fp8_tensor(tensor)[1]
    save_file(tensors, values / "model.safetensors", {"format": "pt"})


def as_int4(folder: Path, out: Path, what: str = EXPERTS) -> Path:
    """A copy of a float32 checkpoint with experts rounded as LVLLM_MOE_USE_WEIGHT=INT4 does it."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    for name, tensor in tensors.items():
        if re.search(what, name):
            codes, scale = int4(F.pad(tensor.float(), (0, -tensor.shape[1] % 32)), 32)
            values = torch.stack((codes & 15, codes >> 4), -1).flatten(-2).float() - 8
            values *= scale.float().repeat_interleave(32, -1)
            tensors[name] = values[:, : tensor.shape[1]].contiguous()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def to_fp8(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The e4m3 codes of [..., n], and one float32 scale [..., 1] for the last dimension."""
    scale = values.abs().amax(-1, keepdim=True).clamp_min(1e-12) / FP8_LARGEST
    return (values / scale).to(torch.float8_e4m3fn), scale


def fp8_blocks(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """One scale for each block of 128 x 128 weights; the last blocks may be smaller."""
    rows, columns = weight.shape
    down, across = -(-rows // 128), -(-columns // 128)
    padded = torch.zeros(down * 128, across * 128)
    padded[:rows, :columns] = weight
    blocks = padded.view(down, 128, across, 128).transpose(1, 2).reshape(down, across, -1)
    code, scale = to_fp8(blocks)

    def whole(data: torch.Tensor) -> torch.Tensor:
        data = data.view(down, across, 128, 128).transpose(1, 2).reshape(padded.shape)
        return data[:rows, :columns].contiguous()

    return (
        {"weight": whole(code), "weight_scale_inv": scale.squeeze(-1)},
        whole(code.float() * scale),
    )


def fp8_tensor(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """One scale for all weights, and an input scale, which LvLLM ignores."""
    code, scale = to_fp8(weight.flatten())
    return (
        {
            "weight": code.view(weight.shape),
            "weight_scale": scale.squeeze(),
            "input_scale": torch.tensor(0.02),
        },
        (code.float() * scale).view(weight.shape),
    )


def fp8_channels(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """One scale for each row, in bfloat16 as llm-compressor writes it."""
    _, scale = to_fp8(weight)
    scale = scale.bfloat16()
    code = (weight / scale).clamp(-FP8_LARGEST, FP8_LARGEST).to(torch.float8_e4m3fn)
    return {"weight": code, "weight_scale": scale}, code.float() * scale.float()


def integers(
    weight: torch.Tensor, bits: int, group: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Signed integers [rows, columns]; bfloat16 scales and signed zero points [rows, groups]."""
    rows, columns = weight.shape
    groups = weight.view(rows, columns // group, group)
    lowest, highest = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    if symmetric:
        scale = (groups.abs().amax(-1) / (highest + 0.5)).bfloat16()
        zero = torch.zeros_like(scale)
    else:
        low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
        scale = ((high - low) / (highest - lowest)).bfloat16()
        zero = (lowest - low / scale.float()).round().clamp(lowest, highest)
    values = (groups / scale.float()[..., None] + zero.float()[..., None]).round()
    return values.clamp(lowest, highest).view(rows, columns).to(torch.int8), scale, zero


def shuffled_groups(columns: int, size: int) -> torch.Tensor:
    """int32 [columns]: the group of each column, in random order as with act-order."""
    return (torch.randperm(columns) // size).int()


def by_groups(
    weight: torch.Tensor, bits: int, groups: torch.Tensor, size: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `integers`, for columns in these groups; the fourth tensor holds the values they mean."""
    order = groups.argsort(stable=True)
    values, scale, zero = integers(weight[:, order], bits, size, symmetric)
    placed = torch.empty_like(values)
    placed[:, order] = values
    centred = placed.float() - zero.float()[:, groups]
    return placed, scale, zero, centred * scale.float()[:, groups]


def packed_integers(
    bits: int, group: int | None, symmetric: bool, shuffled: bool = False
) -> Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]:
    """compressed-tensors' pack-quantized; a `group` of None is a row."""

    def pack(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        size = group or weight.shape[1]
        groups = torch.arange(weight.shape[1]) // size
        if shuffled:
            groups = shuffled_groups(weight.shape[1], size)
        values, scale, zero, meant = by_groups(weight, bits, groups, size, symmetric)
        stored = {
            "weight_packed": pack_to_int32(values, bits),
            "weight_scale": scale,
            "weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            stored["weight_zero_point"] = pack_to_int32(zero.to(torch.int8), bits, packed_dim=0)
        if shuffled:
            stored["weight_g_idx"] = groups
        return stored, meant

    return pack


def int8_channels(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """Unpacked int8, and one scale for each row."""
    values, scale, _ = integers(weight, 8, weight.shape[1], symmetric=True)
    return {"weight": values, "weight_scale": scale}, values.float() * scale.float()


def words(codes: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """uint8 [A, B * n] -> int32 [A, B] of n codes each; code order[i] goes into the i-th bits."""
    bits = 32 // len(order)
    parts = codes.to(torch.int64).unflatten(1, (-1, len(order)))[..., list(order)]
    shifts = torch.arange(len(order)) * bits
    return (parts << shifts).sum(-1).to(torch.uint32).view(torch.int32)


def awq(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """Groups of 32 with zero points; scales in float16."""
    values, scale, zero = integers(weight, 4, 32, symmetric=False)
    scale = scale.half()
    codes, zeros = values + 8, zero + 8
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    stored = {
        "qweight": words(codes.t(), order),
        "qzeros": words(zeros.t(), order),
        "scales": scale.t(),
    }
    groups = codes.float().view(*scale.shape, 32) - zeros.float()[..., None]
    return stored, (groups * scale.float()[..., None]).view(weight.shape)


def gptq(
    bits: int, group: int, symmetric: bool = True, shuffled: bool = False
) -> Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]:
    """A `group` of -1 is a row. Zero points are stored minus one, as in version 1."""

    def pack(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        size = weight.shape[1] if group == -1 else group
        groups = torch.arange(weight.shape[1]) // size
        if shuffled:
            groups = shuffled_groups(weight.shape[1], size)
        values, scale, zero, meant = by_groups(weight, bits, groups, size, symmetric)
        middle = 1 << (bits - 1)
        order = tuple(range(32 // bits))
        ones = sum(1 << (bits * lane) for lane in order)
        stored = {
            "qweight": words(values.int() + middle, order).t(),
            "qzeros": words(zero.int().t() + middle, order) - ones,
            "scales": scale.t(),
            "g_idx": groups.int(),
        }
        return stored, meant

    return pack


def gptq_scheme(
    bits: int, group: int, symmetric: bool = True, shuffled: bool = False, attention: bool = False
) -> Scheme:
    """A GPTQ checkpoint with quantised experts and, if wanted, quantised attention."""
    not_quantised: dict[str, Any] = {} if attention else {r"-:.*self_attn.*": {}}
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": shuffled,
        "sym": symmetric,
        "dynamic": not_quantised | {r"-:.*mlp\.gate$": {}},
    }
    what = f"{EXPERTS}|{ATTENTION}" if attention else EXPERTS
    return Scheme(config, gptq(bits, group, symmetric, shuffled), ignored=None, what=what)


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def to_e2m1(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest e2m1 values: codes [..., n / 2], the even one in the low nibble, and values."""
    index = (values.abs().unsqueeze(-1) - E2M1).abs().argmin(-1)
    codes = (index + 8 * (values < 0)).to(torch.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, E2M1[index] * values.sign()


def mxfp4(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """One power of two for each group of 32."""
    groups = weight.view(len(weight), -1, 32)
    exponent = (groups.abs().amax(-1).clamp_min(1e-30).log2().floor() - 2).clamp(-127, 127)
    codes, values = to_e2m1(groups / exponent.exp2().unsqueeze(-1))
    stored = {
        "weight_packed": codes.flatten(1),
        "weight_scale": (exponent + 127).to(torch.uint8),
    }
    return stored, (values * exponent.exp2().unsqueeze(-1)).view(weight.shape)


def nvfp4(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """One e4m3 scale for each group of 16, and one float32 that all weights are divided by."""
    groups = weight.view(len(weight), -1, 16)
    divisor = 6 * FP8_LARGEST / weight.abs().max()
    scale = (groups.abs().amax(-1) / 6 * divisor).to(torch.float8_e4m3fn)
    unit = (scale.float() / divisor).unsqueeze(-1)
    codes, values = to_e2m1(groups / unit.clamp_min(1e-30))
    stored = {
        "weight_packed": codes.flatten(1),
        "weight_scale": scale,
        "weight_global_scale": divisor.view(1),
    }
    return stored, (values * unit).view(weight.shape)


def modelopt_nvfp4(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """As `nvfp4` with other names: weights are multiplied by the float32 instead of divided."""
    stored, values = nvfp4(weight)
    return {
        "weight": stored["weight_packed"],
        "weight_scale": stored["weight_scale"],
        "weight_scale_2": 1 / stored["weight_global_scale"].squeeze(),
        "input_scale": torch.tensor(0.01),
    }, values


def compressed_fp8_blocks(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    stored, values = fp8_blocks(weight)
    return {"weight": stored["weight"], "weight_scale": stored["weight_scale_inv"]}, values


def compressed(
    format: str, quantize: Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]], **weights: Any
) -> Scheme:
    """A compressed-tensors checkpoint with one group of targets."""
    inputs = weights.pop("inputs", None)
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    config = {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
    }
    return Scheme(config, quantize, ignored="ignore")


def compressed_integers(
    bits: int, group: int | None, symmetric: bool, shuffled: bool = False
) -> Scheme:
    how: dict[str, Any] = {"strategy": "channel"}
    if group:
        how = {"strategy": "group", "group_size": group}
    if shuffled:
        how["actorder"] = "group"
    return compressed(
        "pack-quantized",
        packed_integers(bits, group, symmetric, shuffled),
        num_bits=bits,
        type="int",
        symmetric=symmetric,
        **how,
    )


EIGHT_BIT_INPUTS = {"num_bits": 8, "symmetric": True, "strategy": "token", "dynamic": True}

FP8_BLOCKS = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}

SCHEMES = {
    "fp8_blocks": Scheme(FP8_BLOCKS, fp8_blocks),
    "fp8_blocks_and_attention": Scheme(FP8_BLOCKS, fp8_blocks, what=f"{EXPERTS}|{ATTENTION}"),
    "fp8_tensor": Scheme({"quant_method": "fp8", "activation_scheme": "static"}, fp8_tensor),
    "compressed_fp8_channels": compressed(
        "float-quantized",
        fp8_channels,
        num_bits=8,
        type="float",
        symmetric=True,
        strategy="channel",
        inputs={**EIGHT_BIT_INPUTS, "type": "float"},
    ),
    "compressed_int8": compressed(
        "int-quantized",
        int8_channels,
        num_bits=8,
        type="int",
        symmetric=True,
        strategy="channel",
        inputs={**EIGHT_BIT_INPUTS, "type": "int"},
    ),
    "compressed_int8_packed": compressed_integers(8, None, True),
    "compressed_int4_groups_of_32": compressed_integers(4, 32, True),
    "compressed_int4_zero_points": compressed_integers(4, 64, False),
    "compressed_int4_channels": compressed_integers(4, None, True),
    "compressed_int4_groups_of_16": compressed_integers(4, 16, False),
    "compressed_int4_act_order": compressed_integers(4, 64, False, shuffled=True),
    "compressed_int8_groups": compressed_integers(8, 64, True),
    "compressed_mxfp4": compressed(
        "mxfp4-pack-quantized",
        mxfp4,
        num_bits=4,
        type="float",
        symmetric=True,
        strategy="group",
        group_size=32,
        scale_dtype="torch.uint8",
    ),
    "compressed_nvfp4": compressed(
        "nvfp4-pack-quantized",
        nvfp4,
        num_bits=4,
        type="float",
        symmetric=True,
        strategy="tensor_group",
        group_size=16,
        scale_dtype="torch.float8_e4m3fn",
    ),
    "compressed_fp8_blocks": compressed(
        "float-quantized",
        compressed_fp8_blocks,
        num_bits=8,
        type="float",
        symmetric=True,
        strategy="block",
        block_structure=[128, 128],
        inputs={
            "num_bits": 8,
            "type": "float",
            "symmetric": True,
            "strategy": "group",
            "group_size": 128,
            "dynamic": True,
        },
    ),
    "modelopt_fp8": Scheme(
        {"quant_method": "modelopt", "quant_algo": "FP8"}, fp8_tensor, ignored="ignore"
    ),
    "modelopt_nvfp4": Scheme(
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16},
        modelopt_nvfp4,
        ignored="ignore",
    ),
    "awq": Scheme(
        {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
        awq,
        ignored="modules_to_not_convert",
    ),
    "gptq_int4": gptq_scheme(4, 64),
    "gptq_int4_zero_points": gptq_scheme(4, 32, symmetric=False, attention=True),
    "gptq_int4_act_order": gptq_scheme(4, 32, shuffled=True, attention=True),
    "gptq_int8": gptq_scheme(8, -1),
    "gptq_int8_groups": gptq_scheme(8, 64, symmetric=False, attention=True),
}

AUTO_ROUND = {
    "quant_method": "auto-round",
    "bits": 4,
    "group_size": 32,
    "sym": False,
    "data_type": "int",
    "packing_format": "auto_round:auto_gptq",
    "extra_config": {r".*mlp\.gate$": {"bits": 16}},
}
SCHEMES["auto_round"] = Scheme(
    AUTO_ROUND, gptq(4, 32, False), ignored=None, what=f"{EXPERTS}|{ATTENTION}"
)


def two_compressed() -> Scheme:
    """Layer 0 is quantised to 4 bits, layer 1 to fp8; layer 2, if there is one, is not."""
    ints, floats = SCHEMES["compressed_int4_groups_of_32"], SCHEMES["compressed_fp8_channels"]
    groups = {}
    for name, scheme, layer in (("group_0", ints, 0), ("group_1", floats, 1)):
        groups[name] = {
            **scheme.config["config_groups"]["group_0"],
            "targets": [rf"re:.*layers\.{layer}\..*"],
            "format": scheme.config["format"],
        }
    config = ints.config | {"format": "mixed-precision", "config_groups": groups}
    also = replace(floats, what=SECOND_LAYER)
    return Scheme(config, ints.quantize, ignored="ignore", what=FIRST_LAYER, also=also)


MIXED = {
    "fp8_blocks_and_bf16": replace(SCHEMES["fp8_blocks"], what=FIRST_LAYER),
    "compressed_int4_and_bf16": replace(SCHEMES["compressed_int4_groups_of_32"], what=FIRST_LAYER),
    "compressed_int4_and_fp8": two_compressed(),
    "awq_and_bf16": replace(SCHEMES["awq"], what=FIRST_LAYER),
    "gptq_and_bf16": replace(SCHEMES["gptq_int4_act_order"], what=FIRST_LAYER),
    "modelopt_nvfp4_and_bf16": replace(SCHEMES["modelopt_nvfp4"], what=FIRST_LAYER),
}
"""Checkpoints whose layers are quantised in different ways."""
