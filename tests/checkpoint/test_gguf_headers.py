"""Headers of GGUF files, good ones and bad ones."""

import struct
import time
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lvllm.checkpoint.gguf_headers import GgufTensor, open_gguf, read_gguf_header
from lvllm.checkpoint.headers import CheckpointError
from lvllm.errors import LvllmError
from lvllm.planning import gguf_shape
from tests.planning.gguf_files import small, write


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        open_gguf(path)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"{path}: ")
    return str(error.value).removeprefix(f"{path}: ")


def test_every_field_and_tensor_is_as_the_package_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    file = gguf.GGUFWriter(path, "llama")
    values = {
        "a": 7,
        "b": -3,
        "c": 1.5,
        "d": True,
        "e": "größe",
        "f": [1, 2, 3],
        "g": [True, False],
    }
    adders = (
        *(file.add_uint64, file.add_int8, file.add_float64, file.add_bool, file.add_string),
        *(file.add_array, file.add_array),
    )
    for (name, value), add in zip(values.items(), adders, strict=True):
        add(name, value)  # type: ignore[operator]
    file.add_token_list(["one", "", "three"])
    file.add_array("long", list(range(5000)))
    file.add_tensor("plain", np.ones((3, 5), np.float32))
    for kind in (Type.Q4_0, Type.Q8_0):
        rows = gguf.quants.quantize(np.ones((6, 64), np.float32), kind)
        file.add_tensor(kind.name, rows.reshape(2, 3, -1), raw_dtype=kind)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    header = open_gguf(path)
    assert header.fields == {"general.architecture": "llama", **values}
    words = {"tokenizer.ggml.tokens": ["one", "", "three"]}
    assert open_gguf(path, vocabulary=True).fields == {**header.fields, **words}
    assert header.tensors == {
        tensor.name: GgufTensor(
            tensor.name,
            tuple(int(size) for size in tensor.shape),
            tensor.tensor_type.name,
            int(tensor.n_bytes),
            path,
            int(tensor.data_offset),
        )
        for tensor in gguf.GGUFReader(path).tensors
    }


def test_only_the_header_of_a_large_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    file = gguf.GGUFWriter(path, "llama")
    file.add_token_list([f"token {i}" for i in range(150_000)])
    file.add_token_types([1] * 150_000)
    shape = (512, 7168, 2048)
    for i in range(80):
        file.add_tensor_info(
            f"blk.{i}.ffn_up_exps.weight", shape, np.dtype(np.float16), 0, raw_dtype=Type.Q4_K
        )
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_ti_data_to_file()
    file.close()
    with path.open("r+b") as opened:
        opened.truncate(400 << 30)
    begin = time.process_time()
    header = open_gguf(path)
    # The time is not the point: reading 400 GiB would take minutes.
    assert time.process_time() - begin < 60
    assert sum(tensor.nbytes for tensor in header.tensors.values()) > 300 << 30
    assert path.stat().st_blocks * 512 < 1 << 25  # Nothing was written either.


def test_the_files_of_a_model(tmp_path: Path) -> None:
    matrix = ((4, 256), Type.Q4_K)
    names = [f"x-{i + 1:05}-of-00003.gguf" for i in range(3)]
    for i, name in enumerate(names):
        fields = {"block_count": 3} if i == 0 else {}
        tensors = {f"t{i}": matrix, f"u{i}": matrix}
        split = {"no": i, "count": 3, "tensors_count": 6}
        write(tmp_path / name, "llama", fields, tensors, **split)
    for name in names:
        header = open_gguf(tmp_path / name)
        assert header.file == tmp_path / names[0]
        assert header.fields["llama.block_count"] == 3
        assert sorted(header.tensors) == ["t0", "t1", "t2", "u0", "u1", "u2"]
    alone = tmp_path / "renamed.gguf"
    alone.write_bytes((tmp_path / names[1]).read_bytes())
    assert refusal(alone).startswith("is one of 3 files of a model, whose names must end in -00001")
    (tmp_path / names[2]).write_bytes((tmp_path / names[1]).read_bytes())
    assert refusal(tmp_path / names[2]) == "tensor 't1' is in another part too"
    write(tmp_path / names[2], "llama", {}, {"t2": matrix}, no=2, count=3)
    assert refusal(tmp_path / names[0]) == "6 tensors are wanted, and the 3 files have 5"
    (tmp_path / names[1]).unlink()
    with pytest.raises(CheckpointError) as error:
        open_gguf(tmp_path / names[0])
    missing = "is not there; 1 of the model's 3 files are missing"
    assert str(error.value) == f"{tmp_path / names[1]}: {missing}"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty, and no GGUF file"),
        (b"GG", "truncated: has 2 bytes, and its header has more"),
        (b"GGUF", "truncated: has 4 bytes, and its header has more"),
        (b"GGUF\3\0\0\0\1", "truncated: has 9 bytes, and its header has more"),
        (b"PK\3\4 and more", "is no GGUF file: it begins with b'PK\\x03\\x04'"),
        (b"GGUF\1\0\0\0" + bytes(99), "is of GGUF's version 1; known are 2 and 3"),
        (b"GGUF\7\0\0\0" + bytes(99), "is of GGUF's version 7; known are 2 and 3"),
        (b"GGUF\0\0\0\3" + bytes(99), "is a big-endian GGUF file; a little-endian one is wanted"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a git-LFS pointer, not the weights"),
        # Lengths that no file has.
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "truncated: "),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 62), "truncated: "),
        (b"GGUF" + struct.pack("<IQQQIIQ", 3, 0, 1, 0, 9, 4, 1 << 62), "truncated: "),
        (b"GGUF" + struct.pack("<IQQQIIQ", 3, 0, 1, 0, 9, 8, 1 << 62), "truncated: "),
        (
            b"GGUF"
            + struct.pack("<IQQ", 3, 1 << 60, 0)
            + b"".join(struct.pack("<Q6sIQIQ", 6, b"%06d" % i, 1, 32, 0, 0) for i in range(1 << 17))
            + bytes(99),
            f"has {1 << 60} tensors, allowed are 131072",
        ),
        (
            b"GGUF"
            + struct.pack("<IQQ", 3, 0, 1 << 60)
            + b"".join(struct.pack("<QIB", 0, 0, 0) for _ in range(1 << 12))
            + bytes(99),
            f"has {1 << 60} fields, allowed are 4096",
        ),
        (
            b"GGUF" + struct.pack("<IQQQ17sII", 3, 0, 1, 17, b"general.alignment", 4, 0),
            "field 'general.alignment' is 0, allowed is 1 to 1048576",
        ),
        # Types that nobody knows.
        (b"GGUF" + struct.pack("<IQQQI", 3, 0, 1, 0, 99), "field '' is of the unknown type 99"),
        (b"GGUF" + struct.pack("<IQQQII", 3, 0, 1, 0, 9, 9) + bytes(8), "field '' is a list of th"),
        (
            b"GGUF" + struct.pack("<IQQQsIQIQ", 3, 1, 0, 1, b"t", 1, 32, 999, 0),
            "tensor 't' is of the unknown type 999",
        ),
        (
            b"GGUF" + struct.pack("<IQQQsIQIQ", 3, 1, 0, 1, b"t", 1, 33, 2, 0),
            "tensor 't' has rows of 33 weights, Q4_0 has blocks of 32",
        ),
        (
            b"GGUF" + struct.pack("<IQQQsIQIQ", 3, 1, 0, 1, b"t", 1, 0, 2, 0),
            "tensor 't' has the shape (0,), which holds nothing",
        ),
        (
            b"GGUF" + struct.pack("<IQQQsI", 3, 1, 0, 1, b"t", 5),
            "tensor 't' has 5 dimensions, allowed are 1 to 4",
        ),
        (
            b"GGUF" + struct.pack("<IQQQs", 3, 1, 0, 1, b"\xff"),
            "has a name or text that is not UTF",
        ),
    ],
)
def test_bad_files(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    assert refusal(path).startswith(said)


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    assert refusal(tmp_path / "x.gguf") == "No such file or directory"
    assert refusal(tmp_path) == "Is a directory"


def test_a_hole_after_a_wrong_length_ends(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQQIIQ", 3, 0, 1, 0, 9, 8, 1 << 62))
    with path.open("r+b") as opened:
        opened.truncate(400 << 30)
    assert refusal(path).startswith("has a header of more than 134217728 bytes, or a wrong one")


def test_a_big_endian_file_of_the_package(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    file = gguf.GGUFWriter(path, "llama", endianess=gguf.GGUFEndian.BIG)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.close()
    assert refusal(path).startswith("is a big-endian GGUF file")


def test_a_header_that_is_cut_anywhere(tmp_path: Path) -> None:
    whole = small(tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "x.gguf"
    name = b"blk.1.ffn_down_exps.weight"
    # Behind the last tensor's name are its dimensions' number, three of them, its type and place.
    end = whole.rindex(name) + len(name) + 4 + 3 * 8 + 4 + 8
    path.write_bytes(whole[:end])
    found = read_gguf_header(path).tensors
    assert found == {
        name: replace(tensor, file=path)
        for name, tensor in read_gguf_header(tmp_path / "whole.gguf").tensors.items()
    }
    for size in range(8, end, 7):
        path.write_bytes(whole[:size])
        assert refusal(path) == f"truncated: has {size} bytes, and its header has more"


@given(st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=4))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_changed_bytes_never_end_in_a_traceback(
    tmp_path: Path, changes: list[tuple[int, int]]
) -> None:
    path = tmp_path / "whole.gguf"
    if not path.exists():
        small(path)
    content = bytearray(path.read_bytes())
    for place, value in changes:
        content[place % len(content)] = value
    changed = tmp_path / "x.gguf"
    changed.write_bytes(content)
    said = ""
    try:
        gguf_shape.of_file(changed, "x")
    except LvllmError as error:
        said = str(error)
    assert "\n" not in said
