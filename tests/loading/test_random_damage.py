"""Random damage to a checkpoint is refused in one line, or leaves all other experts as they were.

The checkpoint has one layer of experts in two files with an index. It is read by LvLLM's reader and
loaded by vLLM's layer.
"""

import itertools
import json
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe import FusedMoEFactory

from lvllm.checkpoint.headers import INDEX, Checkpoint
from lvllm.loading import in_hand, model_loader
from lvllm.loading.reader import Reader, in_loading_order
from tests.formats.test_descriptors import vllms_view
from tests.models.quantize import SCHEMES, Tensors
from tests.moe.test_shapes import misshapen

EXPERTS, HIDDEN, INTERMEDIATE = 2, 64, 128
PREFIX = "model.layers.0.mlp.experts."
SCHEMES_HERE = (
    "plain",
    "compressed_fp8_channels",
    "compressed_int4_zero_points",
    "compressed_mxfp4",
    "compressed_nvfp4",
    "gptq_int4_act_order",
)
FILES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
UNUSED = ("weight_shape", "qzeros")
"""The ends of the names of tensors that these schemes have, and that LvLLM does not need."""
MODELS = itertools.count()
EVERY = set(range(EXPERTS))
Loaded = dict[str, torch.Tensor]


class Refused(Exception):
    """Loading ended in one line."""


@cache
def sound(scheme: str) -> Tensors:
    stored = {}
    for expert in range(EXPERTS):
        for name in ("gate_proj", "up_proj", "down_proj"):
            rows, columns = (HIDDEN, INTERMEDIATE) if "down" in name else (INTERMEDIATE, HIDDEN)
            weight = torch.randn(rows, columns)
            parts = {"weight": weight.bfloat16()}
            if scheme != "plain":
                parts, _ = SCHEMES[scheme].quantize(weight)
            for suffix, data in parts.items():
                stored[f"{PREFIX}{expert}.{name}.{suffix}"] = data.contiguous()
    return stored


def write(folder: Path, tensors: Tensors) -> None:
    """Put every other tensor into the second file."""
    names = sorted(tensors)
    placed = {name: FILES[number % 2] for number, name in enumerate(names)}
    for file in FILES:
        save_file({name: tensors[name] for name in names if placed[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": placed}))


def load(folder: Path, scheme: str, config: VllmConfig) -> Loaded:
    """The tensors of the loaded layer, or Refused. Raises AssertionError if that is no line."""
    in_hand.clear()
    section = {} if scheme == "plain" else {"quant_config": vllms_view(SCHEMES[scheme].config)}
    with set_current_vllm_config(config):
        name = f"damaged{next(MODELS)}.layers.0.mlp.experts"
        layer = FusedMoEFactory(
            num_experts=EXPERTS,
            top_k=1,
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            params_dtype=torch.bfloat16,
            prefix=name,
            **section,
        ).routed_experts
        config.compilation_config.static_forward_context.pop(name)
        try:
            infos = in_loading_order(Checkpoint.open(folder).tensors.values())
            weights = ((t.source.info.name, t) for t in Reader([0]).read(infos))
            list(layer.load_weights((n.removeprefix(PREFIX), t) for n, t in weights))
            layer.quant_method.process_weights_after_loading(layer)
        except Exception as error:
            line = model_loader.describe(error)
            if line is None:
                raise
            assert "\n" not in line
            raise Refused(line) from None
        finally:
            in_hand.clear()
        return {key: data.clone() for key, data in layer.engine.tensors.items()}


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def write_header(file: Path, header: str, data: bytes) -> None:
    written = header.encode()
    file.write_bytes(len(written).to_bytes(8, "little") + written + data)


Damage = Callable[[st.DataObject, Path, Tensors], set[int] | None]
"""Damages the files in a folder that hold these tensors.

It returns the experts whose numbers may be others afterwards. With none of them, it has to be
refused; None says that all numbers are the same, if it is not refused.
"""


def a_file(data: st.DataObject, folder: Path) -> Path:
    return folder / data.draw(st.sampled_from(FILES))


def a_name(data: st.DataObject, tensors: Tensors) -> str:
    names = sorted(name for name in tensors if not name.endswith(UNUSED))
    return data.draw(st.sampled_from(names))


def expert_of(name: str) -> int:
    return int(name.removeprefix(PREFIX).partition(".")[0])


def truncated(data: st.DataObject, folder: Path, tensors: Tensors) -> set[int]:
    file = a_file(data, folder)
    os.truncate(file, data.draw(st.integers(0, file.stat().st_size - 1)))
    return set()


def longer_file(data: st.DataObject, folder: Path, tensors: Tensors) -> set[int]:
    with a_file(data, folder).open("ab") as file:
        file.write(data.draw(st.binary(min_size=1, max_size=64)))
    return set()


def header_length(data: st.DataObject, folder: Path, tensors: Tensors) -> set[int]:
    file = a_file(data, folder)
    written = bytearray(file.read_bytes())
    length = int.from_bytes(written[:8], "little")
    # A header may end in spaces, which the one that save_file writes does.
    wrong = st.integers(0, length // 2) | st.integers(length + 1, (1 << 64) - 1)
    written[:8] = data.draw(wrong).to_bytes(8, "little")
    file.write_bytes(written)
    return set()


def a_byte_of_the_header(data: st.DataObject, folder: Path, tensors: Tensors) -> set[int]:
    file = a_file(data, folder)
    written = bytearray(file.read_bytes())
    length = int.from_bytes(written[:8], "little")
    written[8 + data.draw(st.integers(0, length - 1))] ^= data.draw(st.integers(1, 255))
    file.write_bytes(written)
    return EVERY


def offsets(data: st.DataObject, folder: Path, tensors: Tensors) -> set[int]:
    file = a_file(data, folder)
    header, values = header_of(file)
    name = data.draw(st.sampled_from(sorted(header.keys() - {"__metadata__"})))
    place = header[name]["data_offsets"]
    place[data.draw(st.integers(0, 1))] += data.draw(
        st.integers(-200, 200).filter(bool) | st.sampled_from([1 << 62, -(1 << 62), 0.5])
    )
    write_header(file, json.dumps(header), values)
    return set()


def twice_in_a_header(data: st.DataObject, folder: Path, tensors: Tensors) -> set[int]:
    file = a_file(data, folder)
    header, values = header_of(file)
    name = data.draw(st.sampled_from(sorted(header.keys() - {"__metadata__"})))
    again = json.dumps({name: header[name]}).removesuffix("}")
    write_header(file, again + ", " + json.dumps(header).removeprefix("{"), values)
    return set()


def called_another_dtype(data: st.DataObject, folder: Path, tensors: Tensors) -> set[int]:
    file = a_file(data, folder)
    header, values = header_of(file)
    name = data.draw(st.sampled_from(sorted(header.keys() - {"__metadata__"})))
    names = ["BF16", "F16", "F32", "I32", "U32", "I8", "U8", "F8_E4M3", "F8_E5M2", "I64", "F7"]
    header[name]["dtype"] = data.draw(st.sampled_from(names))
    write_header(file, json.dumps(header), values)
    return {expert_of(name)}


def missing(data: st.DataObject, folder: Path, tensors: Tensors) -> set[int]:
    name = a_name(data, tensors)
    write(folder, {other: values for other, values in tensors.items() if other != name})
    return set()


def in_both_files(data: st.DataObject, folder: Path, tensors: Tensors) -> set[int]:
    name = a_name(data, tensors)
    for file in FILES:
        save_file(load_file(folder / file) | {name: tensors[name]}, folder / file)
    return set()


def another_shape(data: st.DataObject, folder: Path, tensors: Tensors) -> set[int]:
    name = a_name(data, tensors)
    wrong = misshapen(tensors[name])
    made = wrong[data.draw(st.integers(0, len(wrong) - 1))]
    write(folder, {**tensors, name: made.contiguous().clone()})
    return set()


def another_dtype(data: st.DataObject, folder: Path, tensors: Tensors) -> set[int] | None:
    name = a_name(data, tensors)
    values = tensors[name]
    others = [torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.int16, torch.int64]
    dtype = data.draw(st.sampled_from([torch.float8_e5m2, *others]))
    made = values.to(dtype)
    write(folder, {**tensors, name: made})
    if values.dtype == made.dtype or torch.equal(made.to(values.dtype), values):
        same_kind = values.is_floating_point() == made.is_floating_point()
        return None if same_kind else set()
    rounded = made.is_floating_point() and values.is_floating_point()
    return {expert_of(name)} if rounded and values.itemsize > 1 else set()


def odd_scales(data: st.DataObject, folder: Path, tensors: Tensors) -> set[int]:
    names = sorted(name for name in tensors if "scale" in name)
    if not names:
        return missing(data, folder, tensors)
    name = data.draw(st.sampled_from(names))
    values = tensors[name].clone()
    flat = values.view(-1)
    place = data.draw(st.integers(0, len(flat) - 1))
    if values.dtype == torch.uint8:
        odd = data.draw(st.integers(0, 255))
        flat[place] = odd
        refused = odd == 255
    else:
        number = data.draw(st.sampled_from([torch.nan, torch.inf, -torch.inf, -1.0, 0.0]))
        flat[place] = torch.tensor(number).to(values.dtype)
        finite = bool(flat[place].float().isfinite())
        refused = not finite or (number == 0 and name.endswith("global_scale"))
    write(folder, {**tensors, name: values})
    return set() if refused else {expert_of(name)}


def index(data: st.DataObject, folder: Path, tensors: Tensors) -> set[int]:
    placed = json.loads((folder / INDEX).read_text())["weight_map"]
    name = a_name(data, tensors)
    elsewhere = [str(folder.parent / "outside.safetensors"), f"../{folder.name}/{placed[name]}"]
    shutil.copy(folder / placed[name], elsewhere[0])
    other = FILES[1 - FILES.index(placed[name])]
    placed[name] = data.draw(st.sampled_from([*elsewhere, other, "gone.safetensors", "", 7, None]))
    (folder / INDEX).write_text(json.dumps({"weight_map": placed}))
    return set()


DAMAGES: tuple[Damage, ...] = (
    truncated,
    longer_file,
    header_length,
    a_byte_of_the_header,
    offsets,
    twice_in_a_header,
    called_another_dtype,
    missing,
    in_both_files,
    another_shape,
    another_dtype,
    odd_scales,
    index,
)


@pytest.fixture(scope="module")
def whole(vllm_config: VllmConfig) -> dict[str, Loaded]:
    """What the checkpoints hold without damage."""
    found = {}
    for scheme in SCHEMES_HERE:
        with TemporaryDirectory() as folder:
            write(Path(folder), sound(scheme))
            found[scheme] = load(Path(folder), scheme, vllm_config)
    return found


@pytest.mark.parametrize("damage", DAMAGES)
# Making a failing example smaller would take minutes.
@settings(max_examples=12, phases=[Phase.generate])
@given(data=st.data())
def test_random_damage(
    damage: Damage, whole: dict[str, Loaded], vllm_config: VllmConfig, data: st.DataObject
) -> None:
    scheme = data.draw(st.sampled_from(SCHEMES_HERE))
    with TemporaryDirectory() as outside:
        folder = Path(outside) / "model"
        folder.mkdir()
        write(folder, sound(scheme))
        affected = damage(data, folder, sound(scheme))
        try:
            loaded = load(folder, scheme, vllm_config)
        except Refused:
            return
    assert affected != set(), "this was to be refused"
    others = sorted(EVERY - (affected or set()))
    for name, values in loaded.items():
        assert torch.equal(values[others], whole[scheme][name][others])
