"""Servers that get little of what they need: one line, or right answers."""

import asyncio
import ctypes
import errno
import os
import platform
import random
import re
import resource
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import pytest

from tests.e2e import hostile
from tests.e2e.generate import TINY
from tests.e2e.mounts import mount_for_itself
from tests.e2e.server import END_SECONDS, Server, fail_to_serve
from tests.e2e.test_hostile_requests import MODEL, VOCABULARY
from tests.e2e.warm_process import Before, beginning_with

ARGUMENTS = (str(TINY), "--served-model-name", MODEL, "--max-model-len", "512", "--enforce-eager")
KV_CACHE = {"VLLM_CPU_KVCACHE_SPACE": "1"}
NO_HUGE_PAGES = 41
"""PR_SET_THP_DISABLE of prctl."""
NO_NEW_PRIVILEGES, SECCOMP, FILTER = 38, 22, 2
"""PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP and SECCOMP_MODE_FILTER of prctl."""
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
"""Instructions of a filter; a system call's number is at byte 0 of what they load."""
ALLOW, FAIL_WITH = 0x7FFF0000, 0x00050000
"""SECCOMP_RET_ALLOW and SECCOMP_RET_ERRNO."""
MEMORY_POLICIES = {"x86_64": (237, 238, 239), "aarch64": (235, 236, 237)}
"""The numbers of mbind, set_mempolicy and get_mempolicy; mbind's is the first."""
LIBC = ctypes.CDLL(None, use_errno=True)


def limit(number: int, most: int) -> None:
    resource.setrlimit(number, (most, most))


def fill(folder: str) -> None:
    """Let this process and its children see a full file system in the place of `folder`."""
    mount_for_itself(folder, "64k")
    # A few bytes are left, as on most full disks.
    (Path(folder) / "full").write_bytes(bytes(60 << 10))


def may_mount() -> bool:
    command = ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/dev/shm"]
    with suppress(FileNotFoundError):  # unshare is not installed
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    return False


@pytest.fixture
def group() -> Iterator[Path]:
    """A memory cgroup."""
    root = Path("/sys/fs/cgroup")
    name = f"lvllm-test-{os.getpid()}"
    folder = root / "memory" / name if (root / "memory").is_dir() else root / name
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"only root may make a cgroup: {error}")
    try:
        if not limits(folder):
            pytest.skip("memory is no controller of this cgroup")
        yield folder
    finally:
        # A group cannot be removed as long as the kernel counts a process in it that has ended.
        until = time.monotonic() + END_SECONDS
        while folder.exists() and time.monotonic() < until:
            with suppress(OSError):
                folder.rmdir()
            time.sleep(0.1)


def limits(group: Path) -> list[Path]:
    """The file with a cgroup's limit, in version 1 or 2."""
    files = [group / "memory.limit_in_bytes", group / "memory.max"]
    return [file for file in files if file.exists()]


def join(group: Path, most: int) -> None:
    """Put this process and its children into a cgroup with so many bytes of memory."""
    limits(group)[0].write_text(str(most))
    (group / "cgroup.procs").write_text("0")


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


def test_a_memory_cgroup(group: Path) -> None:
    """With less than the KV cache takes, 1 GiB."""
    line = refused(partial(join, group, 900 << 20))
    assert re.search(r" takes 1\.\d+ GiB of memory .*, 0\.\d+ GiB are free: kv-cache-", line), line


def forbid_memory_policies() -> None:
    """Refuse the system calls as Docker's default seccomp profile does."""
    calls = MEMORY_POLICIES[platform.machine()]
    program = [(LOAD, 0, 0, 0)]
    # Each jumps over what is left of the comparisons, and over the line that allows.
    program += [(JUMP_IF_EQUAL, len(calls) - n, 0, call) for n, call in enumerate(calls)]
    program += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, FAIL_WITH | errno.EPERM)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    given = struct.pack("HP", len(program), ctypes.addressof(code))
    assert LIBC.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0) == 0
    assert LIBC.prctl(SECCOMP, FILTER, given, 0, 0) == 0
    assert LIBC.syscall(calls[0], 0, 0, 0, 0, 0, 0) == -1
    assert ctypes.get_errno() == errno.EPERM


def scarce() -> None:
    """Few open files, no locked memory, no huge pages, no policies for memory."""
    limit(resource.RLIMIT_NOFILE, 256)
    limit(resource.RLIMIT_MEMLOCK, 0)
    assert LIBC.prctl(NO_HUGE_PAGES, 1, 0, 0, 0) == 0
    if platform.machine() in MEMORY_POLICIES:
        forbid_memory_policies()


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
            status = Path(f"/proc/{worker}/status").read_text()
            assert "THP_enabled:\t0" in status
            if platform.machine() in MEMORY_POLICIES:
                assert "Seccomp:\t2" in status
            idle = [hostile.connect(server) for _ in range(400)]
            for connection in idle:
                connection.close()
            asyncio.run(hostile.crowd(server, MODEL, random.choices(asked, k=30), 30))
            hostile.settle(server)
            for one in asked:
                assert hostile.answer(client, MODEL, one.prompt, len(one.answer)) == one.answer
