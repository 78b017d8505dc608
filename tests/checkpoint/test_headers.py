"""The headers of safetensors files: sound ones, and every damage that has an error of its own."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lvllm.checkpoint.headers import INDEX, LONGEST_HEADER, Checkpoint, CheckpointError

Header = dict[str, Any]


def write(path: Path, header: Header | bytes, data: bytes = b"") -> Path:
    """Write a file with this header and these data, whether they fit each other or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str, shape: list[int], begin: int, end: int) -> Header:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two shards and an index, as save_pretrained writes them."""
    shards = {
        "model-00001-of-00002.safetensors": {
            "embed": torch.rand(5, 3).bfloat16(),
            "layers.0.scale": torch.rand(7),
        },
        "model-00002-of-00002.safetensors": {
            "layers.1.code": torch.randint(0, 255, (3, 5), dtype=torch.uint8),
            "nothing": torch.empty(0, 4),
        },
    }
    for file, tensors in shards.items():
        save_file(tensors, tmp_path / file, {"format": "pt"})
    placed = {name: file for file, tensors in shards.items() for name in tensors}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return tmp_path


def refused(folder: Path, *words: str) -> str:
    """Assert that the folder is refused in one line with these words, and return the line."""
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    line = str(caught.value)
    assert "\n" not in line
    for word in words:
        assert word in line
    return line


def test_a_sound_checkpoint(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    assert [file.name[:11] for file in checkpoint.files] == ["model-00001", "model-00002"]
    assert set(checkpoint.tensors) == {"embed", "layers.0.scale", "layers.1.code", "nothing"}
    embed = checkpoint.tensors["embed"]
    assert (embed.dtype, embed.shape, embed.nbytes) == (torch.bfloat16, (5, 3), 30)
    assert checkpoint.tensors["nothing"].nbytes == 0
    assert checkpoint.nbytes == 30 + 28 + 15
    for file in checkpoint.files:
        last = max(tensor.end for tensor in checkpoint.tensors.values() if tensor.file == file)
        assert last == file.stat().st_size


def test_without_an_index_all_files_count(folder: Path) -> None:
    (folder / INDEX).unlink()
    assert len(Checkpoint.open(folder).tensors) == 4


def test_files_outside_the_index_are_left(folder: Path) -> None:
    save_file({"embed": torch.rand(2)}, folder / "consolidated.safetensors")
    assert len(Checkpoint.open(folder).files) == 2


DAMAGED_FILES: dict[str, tuple[Header | bytes, bytes, str]] = {
    "no JSON": (b"{'a': 1}", b"", "the header is no JSON"),
    "no UTF-8": (b'{"\xff": 1}', b"", "the header is no JSON"),
    "nested too deep": (b"[" * 100_000, b"", "the header is no JSON"),
    "no object": (b"[1, 2]", b"", "no JSON object"),
    "twice in the header": (
        b'{"a": {"dtype": "U8"}, "b": 1, "a": {"dtype": "U8"}}',
        b"",
        "tensor 'a' is in the header twice",
    ),
    "no fields": ({"a": 3}, b"", "tensor 'a': the header has no dtype"),
    "no dtype": ({"a": {"shape": [], "data_offsets": [0, 1]}}, b"x", "unknown dtype null"),
    "unknown dtype": ({"a": entry("F7", [1], 0, 1)}, b"x", "tensor 'a': unknown dtype 'F7'"),
    "negative size": ({"a": entry("U8", [-1], 0, 1)}, b"x", "shape is [-1]"),
    "size true": ({"a": entry("U8", [True], 0, 1)}, b"x", "shape is [true]"),
    "many sizes": ({"a": entry("U8", [1] * 65, 0, 1)}, b"x", "wanted a list of at most 64 sizes"),
    "size too large": ({"a": entry("U8", [1 << 63], 0, 1)}, b"x", "shape is [9223372036854775808]"),
    "no offsets": ({"a": {"dtype": "U8", "shape": [1]}}, b"x", "data_offsets is null"),
    "one offset": ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0]}}, b"x", "[0]"),
    "backwards": ({"a": entry("U8", [1], 1, 0)}, b"x", "data_offsets is [1, 0]"),
    "shape and offsets": (
        {"a": entry("F32", [3, 2], 0, 20)},
        bytes(20),
        "tensor 'a': F32 [3, 2] takes 24 bytes, data_offsets [0, 20] have 20",
    ),
    "overlap": (
        {"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 2, 6)},
        bytes(6),
        "tensor 'b': overlaps the one before it",
    ),
    "gap": (
        {"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 3, 5)},
        bytes(5),
        "tensor 'b': leaves a gap before it",
    ),
    "too much": ({"a": entry("U8", [2], 0, 2)}, bytes(5), "has 3 bytes behind its last tensor"),
    "truncated": ({"a": entry("U8", [9], 0, 9)}, bytes(5), "tensor 'a': truncated: ends at byte"),
}


@pytest.mark.parametrize("damage", DAMAGED_FILES)
def test_damaged_files(damage: str, tmp_path: Path) -> None:
    header, data, fault = DAMAGED_FILES[damage]
    file = write(tmp_path / "model.safetensors", header, data)
    assert refused(tmp_path, fault).startswith(f"{file}: ")


def test_every_truncation_is_found(folder: Path) -> None:
    file = folder / "model-00001-of-00002.safetensors"
    whole = file.read_bytes()
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        assert refused(folder, "truncated").startswith(str(file))


def test_a_header_that_is_too_long(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes((LONGEST_HEADER + 1).to_bytes(8, "little") + b"{}")
    refused(tmp_path, "a.safetensors", f"a header of {LONGEST_HEADER + 1} bytes")


def test_a_pointer_instead_of_weights(folder: Path) -> None:
    file = folder / "model-00002-of-00002.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 1\n")
    refused(folder, str(file), "git-LFS pointer", "git lfs pull")


def test_a_tensor_in_two_shards(folder: Path) -> None:
    save_file({"embed": torch.rand(2)}, folder / "model-00002-of-00002.safetensors")
    refused(folder, "model-00002", "tensor 'embed'", "is in model-00001-of-00002.safetensors too")


def test_a_shard_that_is_not_there(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(
        folder, INDEX, "'layers.1.code'", "model-00002-of-00002.safetensors, which is not there"
    )


def test_a_tensor_that_its_shard_lacks(folder: Path) -> None:
    save_file({"nothing": torch.empty(0)}, folder / "model-00002-of-00002.safetensors")
    refused(folder, "model-00002", "tensor 'layers.1.code' is not in this file", INDEX)


def test_a_tensor_in_another_shard_than_the_index_says(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["embed"] = "model-00002-of-00002.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, "model-00002", "'embed'", "it is in model-00001-of-00002.safetensors")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {"a": 1}}', "version https"])
def test_a_damaged_index(text: str, folder: Path) -> None:
    (folder / INDEX).write_text(text)
    assert refused(folder).startswith(f"{folder / INDEX}: ")


@pytest.mark.parametrize(
    ("file", "advice"),
    [
        ("pytorch_model.bin", "load-format=npcache reads it"),
        ("model.pt", "load-format=pt reads it"),
        ("model.pth", "convert it"),
    ],
)
def test_only_safetensors(file: str, advice: str, tmp_path: Path) -> None:
    torch.save({}, tmp_path / file)
    refused(tmp_path, file, "by default only safetensors are read", advice)


def test_an_empty_folder(tmp_path: Path) -> None:
    refused(tmp_path, str(tmp_path), "no *.safetensors")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blob")
    refused(tmp_path, "model.safetensors", "No such file")


@pytest.mark.parametrize("name", [INDEX, "model-00002-of-00002.safetensors"])
@pytest.mark.parametrize("kind", ["a FIFO", "a folder", "a device"])
def test_what_is_no_regular_file_is_refused_at_once(folder: Path, name: str, kind: str) -> None:
    """To open a FIFO would wait for ever."""
    (folder / name).unlink()
    if kind == "a FIFO":
        os.mkfifo(folder / name)
    elif kind == "a folder":
        (folder / name).mkdir()
    else:
        (folder / name).symlink_to("/dev/zero")
    said = "Is a directory" if kind == "a folder" else "is no regular file"
    with pytest.raises(CheckpointError, match=rf"{name}: {said}$"):
        Checkpoint.open(folder)
