"""The memory that a model's weights need, from the headers of made-up files."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lvllm.checkpoint.headers import Checkpoint, TensorInfo
from lvllm.formats import Section
from lvllm.machine.memory_need import Need, layers_of_experts, needed
from lvllm.settings.use_weight import LayerFormats, UseWeight, UseWeights

Tensors = Mapping[str, tuple[str, list[int]]]
SIZES = {"F32": 4, "BF16": 2, "F8_E4M3": 1, "U8": 1, "I32": 4, "F16": 2}


def write_sparse(file: Path, tensors: Tensors) -> None:
    """Write a safetensors file of these dtypes and shapes that takes no disk space."""
    header: dict[str, object] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + torch.Size(shape).numel() * SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + end)


@pytest.mark.parametrize(
    ("section", "expert", "stored", "weights"),
    [
        (None, {"w1.weight": ("BF16", [64, 128])}, 64 * 128 * 2, 64 * 128),
        (None, {"w1.weight": ("F32", [64, 128])}, 64 * 128 * 2, 64 * 128),
        (
            {"quant_method": "fp8", "weight_block_size": [128, 128]},
            {"w3.weight": ("F8_E4M3", [128, 256]), "w3.weight_scale_inv": ("F32", [1, 2])},
            128 * 256 + 4,
            128 * 256,
        ),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 128},
            {
                "w1.qweight": ("I32", [32, 64]),
                "w1.qzeros": ("I32", [2, 8]),
                "w1.scales": ("F16", [2, 64]),
            },
            32 * 64 * 4 + 64 + 256,
            32 * 64 * 8,
        ),
        (
            {"quant_method": "modelopt", "quant_algo": "NVFP4"},
            {"w1.weight": ("U8", [64, 64])},
            64 * 64,
            64 * 64 * 2,
        ),
    ],
)
def test_bytes_of_formats(
    section: Section | None, expert: Tensors, stored: int, weights: int, tmp_path: Path
) -> None:
    rest: Tensors = {
        "model.embed_tokens.weight": ("BF16", [100, 128]),
        "model.layers.0.mlp.shared_experts.up_proj.weight": ("BF16", [10, 128]),
        # These two belong to drafts.
        "model.layers.4.self_attn.o_proj.weight": ("BF16", [1000, 128]),
        "mtp.layers.0.mlp.experts.0.up_proj.weight": ("BF16", [1000, 128]),
    }
    of_experts = {f"model.layers.3.mlp.experts.7.{name}": what for name, what in expert.items()}
    write_sparse(tmp_path / "model.safetensors", {**rest, **of_experts})
    tensors = Checkpoint.open(tmp_path).tensors
    others = 110 * 128 * 2
    int4 = weights * 9 // 16
    for use, experts in (
        (None, stored),
        (UseWeight.KEEP, stored),
        (UseWeight.TO_DTYPE, 2 * weights),
        (UseWeight.INT4, int4),
    ):
        how = None if use is None else LayerFormats(others=use)
        got = needed(tensors, how, layers=4, section=section)
        assert got == Need(experts, others, 0, int4), use
    with_drafts = needed(tensors, None, layers=4, drafts=True, section=section)
    assert with_drafts.experts == stored + 256_000
    assert with_drafts.others == others + 256_000
    # vLLM holds the experts of drafts, and those of resident layers, as they are stored.
    for how in (None, LayerFormats(others=UseWeight.INT4)):
        got = needed(tensors, how, layers=4, drafts=True, resident=(), section=section)
        assert got == Need(int4 if how else stored, others + 512_000, 0, int4)
        got = needed(tensors, how, layers=4, drafts=True, resident=(0, 3), section=section)
        assert got == Need(0, others + 512_000 + stored, 0, 0)


FORMAT = st.sampled_from(UseWeight)


@given(
    st.lists(FORMAT, min_size=1, max_size=6), st.lists(st.integers(1, 4), min_size=6, max_size=6)
)
def test_each_layer_counts_in_the_format_of_its_rule(
    formats: list[UseWeight], experts: list[int]
) -> None:
    """The layers have different numbers of experts; those without a rule count as they are stored.

    The names by which the rules know the layers are not those of the checkpoint.
    """
    tensors = {}
    for layer, count in enumerate(experts):
        for expert in range(count):
            for name, dtype, shape in (
                ("weight", torch.float8_e4m3fn, (64, 96)),
                ("weight_scale", torch.bfloat16, (64, 1)),
            ):
                full = f"model.language_model.layers.{layer}.mlp.experts.{expert}.up_proj.{name}"
                size = torch.Size(shape).numel() * dtype.itemsize
                tensors[full] = TensorInfo(full, Path("f"), dtype, shape, 0, size)
    rules = UseWeights.model_validate(
        [{rf"^language_model\.model\.layers\.{n}\.": use} for n, use in enumerate(formats)]
    )
    names = [f"language_model.model.layers.{n}.mlp.experts" for n in range(len(experts))]
    use = LayerFormats.by_rules(rules, names)
    need = needed(tensors, use, layers=len(experts), section={"quant_method": "fp8"})
    sizes = {
        UseWeight.KEEP: 64 * 96 + 64 * 2,
        UseWeight.TO_DTYPE: 64 * 96 * 2,
        UseWeight.INT4: 64 * 96 * 9 // 16,
        UseWeight.INT8: 64 * 96 + 64 * 2,  # as stored, since they have 8 bits already
        UseWeight.FP8: 64 * 96 + 64 * 2,
    }
    kept = [UseWeight.KEEP] * len(experts)
    expected = [sizes[how] * count for how, count in zip([*formats, *kept], experts, strict=False)]
    assert need == Need(sum(expected), 0, 0, sizes[UseWeight.INT4] * sum(experts))
    found = layers_of_experts(tensors, layers=4, drafts=False)
    assert found == [f"model.language_model.layers.{n}.mlp.experts" for n in range(4)]
