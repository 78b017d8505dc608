"""A folder of safetensors files with an index, as `lvllm.checkpoint.headers` reads it.

The first byte says what the rest is: a file, the JSON of a header that is put into a file with as
many data as it wants, or the index of a sound file.
"""

import json
import math
from pathlib import Path

import torch

from lvllm.checkpoint.headers import INDEX, Checkpoint
from lvllm.machine.memory_need import layers_of_experts, needed
from tests.fuzz.rules import ask
from tests.fuzz.scratch import scratch_folder

MOST_DATA = 1 << 16
SOUND = json.dumps({"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}).encode()


def one_input(data: bytes) -> None:
    kind, rest = data[:1], data[1:]
    with scratch_folder() as folder:
        if kind == b"f":
            (folder / "model.safetensors").write_bytes(rest)
        elif kind == b"i":
            (folder / INDEX).write_bytes(rest)
            (folder / "model.safetensors").write_bytes(_file(SOUND, 2))
        else:
            (folder / "model.safetensors").write_bytes(_file(rest, _data_size(rest)))
        if (found := ask(Checkpoint.open, folder)) is not None:
            _check(found, folder)


def _check(found: Checkpoint, folder: Path) -> None:
    for tensor in found.tensors.values():
        assert tensor.file.parent == folder
        assert 8 <= tensor.start <= tensor.end <= tensor.file.stat().st_size
        assert tensor.nbytes == math.prod(tensor.shape) * tensor.dtype.itemsize
        torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    layers_of_experts(found.tensors, layers=4, drafts=False)
    need = needed(found.tensors, None, layers=4)
    assert 0 <= need.total <= found.nbytes


def _file(header: bytes, size: int) -> bytes:
    return len(header).to_bytes(8, "little") + header + bytes(size)


def _data_size(header: bytes) -> int:
    """The bytes of data that a header describes, as far as it can be read."""
    try:
        ends = [one["data_offsets"][1] for one in json.loads(header).values()]
        return min(MOST_DATA, max(0, *ends))
    except Exception:
        return 0
