"""The folder of a server's sockets and rendezvous files."""

import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from lvllm.errors import LvllmError
from lvllm.faults import scratch

SERVER = """
import sys
from lvllm.faults import scratch
scratch.prepare()
import os
print(os.environ.get("VLLM_RPC_BASE_PATH"), scratch.file_store(), flush=True)
sys.stdin.readline()
"""


class Server:
    """A process that has such a folder."""

    def __init__(self, parent: Path, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={"TMPDIR": str(parent)} | environment,
        )
        assert self.process.stdout is not None
        self.folder, self.store = self.process.stdout.readline().split()

    def end(self) -> None:
        self.process.communicate("end\n", timeout=30)

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def parent() -> Iterator[Path]:
    """A short path, as a socket's may have 107 bytes."""
    with TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


def test_the_folder_goes_with_its_server(parent: Path) -> None:
    server = Server(parent)
    folder = Path(server.folder)
    assert folder.parent == parent
    assert folder.stat().st_mode & 0o777 == 0o700
    assert server.store.startswith(f"file://{folder}/")
    server.end()
    assert not list(parent.iterdir())


def test_the_folder_is_there_until_vllm_has_ended_its_engines(parent: Path) -> None:
    """vLLM does it in a finaliser, which is newer than the folder."""
    script = """
import os, weakref
from lvllm.faults import scratch
weakref.finalize(os.path, print, "older")
scratch.prepare()
weakref.finalize(os.path, lambda: print(os.listdir(os.environ["VLLM_RPC_BASE_PATH"])))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"TMPDIR": str(parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "['lock']\nolder\n"
    assert not list(parent.iterdir())


def test_the_next_start_removes_what_a_killed_server_left(parent: Path) -> None:
    killed, running = Server(parent), Server(parent)
    Path(killed.folder, "socket").touch()
    killed.kill()
    assert Path(killed.folder).exists()
    third = Server(parent)
    assert {str(path) for path in parent.iterdir()} == {running.folder, third.folder}
    running.end()
    third.end()
    assert not list(parent.iterdir())


def test_a_folder_that_the_user_has_chosen_stays(parent: Path) -> None:
    chosen = parent / "mine"
    chosen.mkdir()
    server = Server(parent, VLLM_RPC_BASE_PATH=str(chosen))
    assert (server.folder, server.store) == (str(chosen), "None")
    server.end()
    assert list(parent.iterdir()) == [chosen]


def test_a_path_that_is_too_long_for_sockets_is_not_taken(parent: Path) -> None:
    deep = parent / ("x" * 80)
    deep.mkdir()
    server = Server(deep)
    assert (server.folder, server.store) == ("None", "None")
    server.end()
    assert not list(deep.iterdir())


def test_a_folder_that_cannot_be_written_is_named(
    parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("VLLM_RPC_BASE_PATH", "_LVLLM_SCRATCH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(parent / "gone"))
    with pytest.raises(LvllmError, match=f"{parent}/gone, has no room for 64 KiB"):
        scratch.prepare()


def test_a_full_folder_is_left_empty(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("VLLM_RPC_BASE_PATH", "_LVLLM_SCRATCH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(parent))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The kernel then refuses to write more into a file, as on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(LvllmError, match=r"has no room for 64 KiB: File too large"):
            scratch.prepare()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(parent.iterdir())
