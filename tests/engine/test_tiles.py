"""engine.tiles: lk's order against its definition, its inverse, and the engine itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lvllm.engine import ExpertLayer
from lvllm.engine.tiles import TILE_ROWS, WEIGHT_UNIT, from_tiles, to_tiles
from tests.random_layers import FORMATS, FOUR_BIT, Layer, Random, random_layer

DTYPES = (torch.uint8, torch.int8, torch.bfloat16, torch.float32, torch.float8_e4m3fn)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def by_definition(part: list[bytes], unit: int) -> bytes:
    """One part in the engine's order, byte for byte as the definition says."""
    out = bytearray()
    for first in range(0, len(part), TILE_ROWS):
        tile = part[first : first + TILE_ROWS]
        whole = len(tile[0]) // unit * unit
        for at in range(0, whole, unit):
            for row in tile:
                out += row[at : at + unit]
        for row in tile:
            out += row[whole:]
    return bytes(out)


@settings(max_examples=60, deadline=None)
@given(
    experts=st.integers(1, 3),
    part_rows=st.sampled_from((1, 2, 15, 63, 64, 65, 128, 150, 193)),
    columns=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(((1, False), (2, False), (2, True))),
    element_units=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_definition_and_inverse(
    experts: int,
    part_rows: int,
    columns: int,
    dtype: torch.dtype,
    layout: tuple[int, bool],
    element_units: bool,
    seed: int,
) -> None:
    parts, interleaved = layout
    unit = dtype.itemsize if element_units else WEIGHT_UNIT
    raw = Random(seed).integers(0, 256, experts, parts * part_rows, columns * dtype.itemsize)
    tensor = raw.to(torch.uint8).view(dtype)
    tiles = to_tiles(tensor, parts, unit, interleaved=interleaved)
    assert (tiles.shape, tiles.dtype) == (tensor.shape, tensor.dtype)

    wanted = b""
    for expert in raw.to(torch.uint8):
        rows = [bytes(row.tolist()) for row in expert]
        for part in range(parts):
            of_part = rows[part::2] if interleaved else rows[part * part_rows :][:part_rows]
            wanted += by_definition(of_part, unit)
    assert bytes(as_bytes(tiles).flatten().tolist()) == wanted
    back = from_tiles(tiles, parts, unit, interleaved=interleaved)
    assert torch.equal(as_bytes(back), as_bytes(tensor))


def test_the_source_is_left_alone() -> None:
    tensor = Random().integers(0, 256, 2, 70, 10).to(torch.uint8)
    before = tensor.clone()
    assert not torch.equal(to_tiles(tensor), before)
    assert torch.equal(tensor, before)


def tiled(layer: Layer, name: str) -> torch.Tensor:
    """The argument `name` of a layer in the order the engine should give it."""
    tensor: torch.Tensor = layer.arguments[name]
    of_w13 = name.startswith("w13")
    if name in ("w13", "w2"):
        unit = WEIGHT_UNIT
    else:
        unit = tensor.element_size()
        format = layer.arguments["format"]
        in_groups = format in FOUR_BIT or (format == "int8" and tensor.dim() == 3)
        grouped = in_groups and not name.endswith("bias")
        per_row = tensor.dim() == 2 and "global" not in name
        converted = name.endswith("bias") and tensor.dtype != torch.float32
        if "global" in name or converted or not (grouped or per_row):
            return tensor
    return to_tiles(
        tensor.view(*tensor.shape[:2], -1),
        2 if of_w13 and layer.arguments["activation"] != "relu2" else 1,
        unit,
        interleaved=of_w13 and layer.arguments.get("interleaved", False),
    )


@settings(max_examples=120, deadline=None)
@given(
    format=st.sampled_from(FORMATS),
    experts=st.integers(1, 3),
    sizes=st.tuples(*[st.sampled_from((1, 3, 16, 31, 32, 33, 64, 65, 97, 130))] * 2),
    activation=st.sampled_from(("silu", "swigluoai", "interleaved", "relu2")),
    group_size=st.sampled_from((32, 64, 128, -1)),
    zero=st.booleans(),
    fp8_scale=st.sampled_from(("block", "channel", "tensor")),
    scale_dtype=st.sampled_from((torch.bfloat16, torch.float16, torch.float32)),
    bias_dtype=st.sampled_from((torch.bfloat16, torch.float32)),
    seed=st.integers(0, 2**31),
)
def test_the_engine_keeps_this_order_and_gives_back_the_first(
    format: str,
    experts: int,
    sizes: tuple[int, int],
    activation: str,
    group_size: int,
    zero: bool,
    fp8_scale: str,
    scale_dtype: torch.dtype,
    bias_dtype: torch.dtype,
    seed: int,
) -> None:
    four_bit = format in FOUR_BIT
    hidden, intermediate = (2 * size if four_bit else size for size in sizes)
    layer = random_layer(
        Random(seed),
        format,
        experts,
        hidden,
        intermediate,
        activation="swigluoai" if activation == "interleaved" else activation,
        interleaved=activation == "interleaved",
        bias=True,
        bias_dtype=bias_dtype,
        group_size=group_size,
        zero=zero,
        fp8_scale=fp8_scale,
        scale_dtype=scale_dtype,
    )
    given_tensors = {
        name: value.clone()
        for name, value in layer.arguments.items()
        if isinstance(value, torch.Tensor)
    }
    engine_layer = ExpertLayer(**(layer.arguments | given_tensors))
    for name, tensor in given_tensors.items():
        want = as_bytes(tiled(layer, name))
        assert torch.equal(as_bytes(tensor).flatten(), want.flatten()), name
    engine_layer.release()
    for name, tensor in given_tensors.items():
        assert torch.equal(as_bytes(tensor), as_bytes(layer.arguments[name])), name


@pytest.mark.parametrize("parts", [1, 2])
def test_a_part_of_one_row_keeps_its_bytes(parts: int) -> None:
    tensor = Random().integers(0, 256, 3, parts, 11).to(torch.uint8)
    assert torch.equal(to_tiles(tensor, parts), tensor)
