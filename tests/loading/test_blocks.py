"""Tensors in ggml's blocks, compared with the gguf package."""

import random
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type

from lvllm.checkpoint.headers import CheckpointError, TensorInfo
from lvllm.loading import blocks as module
from lvllm.loading.file_tensor import FileTensor
from lvllm.loading.reader import Reader

ROWS = 24


def can_read(kind: Type) -> bool:
    try:
        gguf.dequantize(np.zeros(GGML_QUANT_SIZES[kind][1], np.uint8), kind)
    except NotImplementedError:
        return False
    return GGML_QUANT_SIZES[kind][0] > 1


KINDS = [kind for kind in Type if can_read(kind)]


def file_tensor(path: Path, kind: Type) -> tuple[FileTensor, torch.Tensor]:
    """Random blocks of two for each row, which begin at byte 5 of a file, and their values."""
    block, nbytes = GGML_QUANT_SIZES[kind]
    draw = np.random.default_rng(random.getrandbits(32))
    raw = draw.integers(0, 256, (ROWS, 2 * nbytes), np.uint8)
    with np.errstate(all="ignore"):
        for row in raw:  # rows with scales that are NaN or infinite are drawn anew
            while not np.isfinite(gguf.dequantize(row, kind)).all():
                row[:] = draw.integers(0, 128, 2 * nbytes, np.uint8)
    path.write_bytes(bytes(5) + raw.tobytes())
    info = TensorInfo(
        "it", path, torch.float32, (ROWS, 2 * block), 5, 5 + raw.nbytes, blocks=kind.name
    )
    values = torch.from_numpy(gguf.dequantize(raw, kind).reshape(ROWS, 2 * block))
    return next(iter(Reader([0]).read([info]))), values


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_type(kind: Type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", 5 * 2 * GGML_QUANT_SIZES[kind][0])
    tensor, values = file_tensor(tmp_path / "x", kind)
    to = torch.empty(values.shape)
    to.copy_(tensor)
    assert torch.equal(to, values)


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "rows": lambda x: x[3:17],
    "columns": lambda x: x[:, 5:29],
    "both": lambda x: x[2:9, 16:48],
    "one row": lambda x: x[7],
    "one column": lambda x: x[:, 7],
    "transposed": lambda x: x.t(),
    "heads": lambda x: x.unflatten(0, (4, 6)).transpose(1, 2),
    "nothing": lambda x: x[3:3],
    "cut into parts": lambda x: x.chunk(2, dim=0)[1],
}


@pytest.mark.parametrize("view", list(VIEWS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views(
    view: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE", 200)
    tensor, values = file_tensor(tmp_path / "x", Type.Q4_1)
    wanted = VIEWS[view](values)
    seen = VIEWS[view](tensor)
    to = torch.empty(wanted.shape, dtype=dtype)
    to.copy_(seen)
    assert torch.equal(to, wanted.to(dtype))
    assert torch.equal(seen + 0, wanted)


def test_a_write_and_other_operations(tmp_path: Path) -> None:
    tensor, values = file_tensor(tmp_path / "x", Type.Q8_0)
    assert torch.equal(tensor.view(torch.int32) + 0, values.view(torch.int32))
    tensor[2:4].mul_(2)
    values[2:4] *= 2
    assert torch.equal(tensor + 0, values)
    to = torch.empty(values.shape)
    to.copy_(tensor)
    assert torch.equal(to, values)


def test_a_scale_that_is_no_number(tmp_path: Path) -> None:
    raw = bytearray(34)
    raw[:2] = np.float16(np.nan).tobytes()
    path = tmp_path / "x"
    path.write_bytes(raw)
    info = TensorInfo("it", path, torch.float32, (1, 32), 0, 34, blocks="Q8_0")
    tensor = next(iter(Reader([0]).read([info])))
    with pytest.raises(CheckpointError, match=r"x: tensor 'it': holds NaN or infinity$"):
        torch.empty(1, 32).copy_(tensor)


def test_a_file_that_ends_early(tmp_path: Path) -> None:
    tensor, values = file_tensor(tmp_path / "x", Type.Q4_0)
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"the file was truncated while it was read$"):
        torch.empty(values.shape).copy_(tensor)
