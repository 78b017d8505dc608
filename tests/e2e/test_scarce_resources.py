"""Servers that get little of what they need: one line, or right answers."""

import asyncio
import ctypes
import os
import random
import resource
import subprocess
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import pytest

from tests.e2e import hostile
from tests.e2e.generate import TINY
from tests.e2e.server import END_SECONDS, Server, fail_to_serve
from tests.e2e.test_hostile_requests import MODEL, VOCABULARY
from tests.e2e.warm_process import Before, beginning_with

ARGUMENTS = (str(TINY), "--served-model-name", MODEL, "--max-model-len", "512", "--enforce-eager")
KV_CACHE = {"VLLM_CPU_KVCACHE_SPACE": "1"}
NEW_MOUNTS, NO_HUGE_PAGES = 0x20000, 41
"""CLONE_NEWNS, and PR_SET_THP_DISABLE of prctl."""
LIBC = ctypes.CDLL(None, use_errno=True)


def limit(number: int, most: int) -> None:
    resource.setrlimit(number, (most, most))


def fill(folder: str) -> None:
    """Let this process and its children see a full file system in the place of `folder`."""
    if LIBC.unshare(NEW_MOUNTS) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder], check=True)
    # A few bytes are left, as on most full disks.
    (Path(folder) / "full").write_bytes(bytes(60 << 10))


def may_mount() -> bool:
    command = ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/dev/shm"]
    with suppress(FileNotFoundError):  # unshare is not installed
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    return False


@pytest.fixture
def temporary() -> Iterator[str]:
    """A short path, as a socket's may have 107 bytes."""
    with TemporaryDirectory(dir="/tmp") as folder:
        yield folder


def refused(before: Before, **environment: str) -> str:
    with beginning_with(before):
        code, errors = fail_to_serve(*ARGUMENTS, command=False, **KV_CACHE, **environment)
    assert code == 1, errors
    assert "Traceback" not in errors
    last = errors.strip().splitlines()[-1]
    assert last.startswith("lvllm: "), errors
    return last


def test_too_few_open_files() -> None:
    line = refused(partial(limit, resource.RLIMIT_NOFILE, 64))
    assert "may have 64 open files (`ulimit -Hn`), and a server needs 256" in line


@pytest.mark.skipif(not may_mount(), reason="only root may mount a full file system")
def test_no_room_in_dev_shm() -> None:
    line = refused(partial(fill, "/dev/shm"))
    assert "/dev/shm has 0 MiB free, and vLLM's processes need 160 MiB" in line


@pytest.mark.skipif(not may_mount(), reason="only root may mount a full file system")
def test_no_room_for_temporary_files(temporary: str) -> None:
    line = refused(partial(fill, temporary), TMPDIR=temporary)
    assert f"the folder for temporary files, {temporary}, has no room for 64 KiB: No space" in line


def scarce() -> None:
    """Few open files, no locked memory, no huge pages."""
    limit(resource.RLIMIT_NOFILE, 256)
    limit(resource.RLIMIT_MEMLOCK, 0)
    assert LIBC.prctl(NO_HUGE_PAGES, 1, 0, 0, 0) == 0


def test_right_answers_with_little(tmp_path: Path) -> None:
    """The tokens of a server that has enough, also beside more clients than may have a socket."""
    asked: list[hostile.Question] = []
    settings = KV_CACHE | {"LVLLM_ACCELERATOR": "host"}
    for before in (nullcontext(), beginning_with(scarce)):
        with (
            before,
            Server(tmp_path / "log", *ARGUMENTS, **settings).ready() as server,
            httpx.Client(base_url=server.url, timeout=END_SECONDS) as client,
        ):
            if not asked:
                asked = hostile.questions(client, MODEL, VOCABULARY, 6, 16)
                continue
            worker = max(server.processes(), key=lambda pid: len(os.listdir(f"/proc/{pid}/task")))
            assert "THP_enabled:\t0" in Path(f"/proc/{worker}/status").read_text()
            idle = [hostile.connect(server) for _ in range(400)]
            for connection in idle:
                connection.close()
            asyncio.run(hostile.crowd(server, MODEL, random.choices(asked, k=30), 30))
            hostile.settle(server)
            for one in asked:
                assert hostile.answer(client, MODEL, one.prompt, len(one.answer)) == one.answer
