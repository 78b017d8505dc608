"""The files that a killed server leaves where PyTorch's compiler looks for finished ones."""

import os
import random
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock

from lvllm.errors import LvllmError
from lvllm.faults import compiled


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A library as g++ links it."""
    folder = tmp_path_factory.mktemp("library")
    (folder / "a.cpp").write_text('extern "C" int twice(int value) { return 2 * value; }\n')
    command = ["g++", "-shared", "-fPIC", "a.cpp", "-o", "a.so"]
    subprocess.run(command, cwd=folder, check=True)
    return (folder / "a.so").read_bytes()


@pytest.fixture(params=["vllm/model/rank_0_0/inductor_cache/qc", "torch/qc"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder of libraries in one of the two caches, with the folder of their locks beside it."""
    folder = tmp_path / request.param
    folder.mkdir(parents=True)
    (folder.parent / "locks").mkdir()
    return folder


def remove(tmp_path: Path) -> None:
    compiled.remove_unfinished(tmp_path / "vllm", tmp_path / "torch")


def test_a_library_cut_short_anywhere_is_removed_and_whole_ones_stay(
    folder: Path, tmp_path: Path, whole: bytes
) -> None:
    (folder / "whole.so").write_bytes(whole)
    (folder / "whole.main.so").write_bytes(whole)
    (folder / "source.main.cpp").write_bytes(b"")
    sizes = [0, 1, 63, 64, len(whole) - 1, *(random.randrange(len(whole)) for _ in range(20))]
    for size in sizes:
        (folder / f"cut{size}.main.so").write_bytes(whole[:size])
    (folder / "empty-header.so").write_bytes(bytes(len(whole)))
    remove(tmp_path)
    assert {path.name for path in folder.iterdir()} == {
        "whole.so",
        "whole.main.so",
        "source.main.cpp",
    }


def test_a_library_that_is_being_built_stays(folder: Path, tmp_path: Path, whole: bytes) -> None:
    library = folder / "key.main.so"
    library.write_bytes(whole[:100])
    with FileLock(folder.parent / "locks" / "key.lock"):
        remove(tmp_path)
        assert library.exists()
    remove(tmp_path)
    assert not library.exists()


def test_a_precompiled_header_newer_than_every_library_is_built_again(
    folder: Path, tmp_path: Path, whole: bytes
) -> None:
    headers = tmp_path / "torch" / "precompiled_headers"
    (headers / "locks").mkdir(parents=True)
    (folder / "key.main.so").write_bytes(whole)
    for path, time in (
        (folder / "key.main.so", 100),
        (headers / "older.h.gch", 99),
        (headers / "newer.h.gch", 101),
        (headers / "newer.h", 101),
        (headers / "in-work.h.gch", 102),
    ):
        path.touch()
        os.utime(path, (time, time))
    with FileLock(headers / "locks" / "in-work.lock"):
        remove(tmp_path)
    assert {path.name for path in headers.iterdir()} == {
        "older.h.gch",
        "newer.h",
        "in-work.h.gch",
        "locks",
    }


def test_caches_that_do_not_exist_are_no_fault(tmp_path: Path) -> None:
    remove(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_code_in_a_folder_of_others_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "torchinductor_me"
    compiled.check_owner(folder)
    assert folder.stat().st_mode & 0o077 == 0
    folder.chmod(0o755)
    compiled.check_owner(folder)
    folder.chmod(0o777)
    with pytest.raises(LvllmError, match="another user can write to it"):
        compiled.check_owner(folder)
    folder.chmod(0o700)
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(LvllmError, match="another user can write to it"):
        compiled.check_owner(tmp_path / "link")
    status = folder.lstat()
    others = SimpleNamespace(st_mode=status.st_mode, st_uid=os.getuid() + 1)
    monkeypatch.setattr(Path, "lstat", lambda path: others)
    with pytest.raises(LvllmError, match="another user can write to it"):
        compiled.check_owner(folder)
