"""Cgroups, ulimits and containers, on made-up machines."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from lvllm.machine.facts import limits
from lvllm.machine.report import Limits
from tests.machine import made_up

GROUP = "sys/fs/cgroup"


def nothing(command: Sequence[str]) -> str | None:
    """No program is installed."""
    return None


def test_the_least_of_nested_limits_counts(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/a/b/c\n",
        f"{GROUP}/cgroup.controllers": "cpu memory\n",
        f"{GROUP}/a/cpu.max": "150000 100000\n",
        f"{GROUP}/a/memory.max": "max\n",
        f"{GROUP}/a/b/cpu.max": "max 100000\n",
        f"{GROUP}/a/b/memory.max": "4096\n",
        f"{GROUP}/a/b/memory.current": "1024\n",
        f"{GROUP}/a/b/c/memory.max": "8192\n",
        f"{GROUP}/a/b/c/memory.current": "512\n",
    }
    found = limits.read(nothing, made_up.write(tmp_path, files))
    assert found.cgroup_version == "2"
    assert found.cpu_quota_cpus == limits.cpu_quota(tmp_path) == 1.5
    assert found.memory_limit_bytes == 4096
    assert found.memory_used_bytes == 512


@pytest.mark.parametrize("folder", ["cpu,cpuacct", "cpu"])
def test_version_1(tmp_path: Path, folder: str) -> None:
    """The path is that of the host, and only the container's own folder is there."""
    files = {
        "proc/self/cgroup": "4:memory:/docker/123\n3:cpu,cpuacct:/docker/123\n1:name=systemd:/\n",
        f"{GROUP}/memory/memory.limit_in_bytes": "1048576\n",
        f"{GROUP}/memory/memory.usage_in_bytes": "4096\n",
        f"{GROUP}/{folder}/cpu.cfs_quota_us": "400000\n",
        f"{GROUP}/{folder}/cpu.cfs_period_us": "100000\n",
    }
    found = limits.read(nothing, made_up.write(tmp_path, files))
    assert found.cgroup_version == "1"
    assert found.cpu_quota_cpus == limits.cpu_quota(tmp_path) == 4
    assert (found.memory_limit_bytes, found.memory_used_bytes) == (1 << 20, 4096)


def test_the_least_of_nested_quotas_of_version_1_counts(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "3:cpu:/a/b\n0::/\n"}
    for path, quota in (("", -1), ("/a", 250_000), ("/a/b", 300_000)):
        files[f"{GROUP}/cpu{path}/cpu.cfs_quota_us"] = f"{quota}\n"
        files[f"{GROUP}/cpu{path}/cpu.cfs_period_us"] = "100000\n"
    assert limits.cpu_quota(made_up.write(tmp_path, files)) == 2.5


def test_version_1_without_limits(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:memory:/\n3:cpu:/\n0::/\n",
        f"{GROUP}/memory/memory.limit_in_bytes": "9223372036854771712\n",
        f"{GROUP}/cpu/cpu.cfs_quota_us": "-1\n",
        f"{GROUP}/cpu/cpu.cfs_period_us": "100000\n",
        f"{GROUP}/unified/cgroup.procs": "1\n",
    }
    found = limits.read(nothing, made_up.write(tmp_path, files))
    assert found.cgroup_version == "1 and 2"
    assert (found.cpu_quota_cpus, found.memory_limit_bytes) == ("unlimited", "unlimited")
    assert limits.cpu_quota(tmp_path) is None


def test_a_path_cannot_leave_the_folder(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/../../other\n",
        f"{GROUP}/memory.max": "4096\n",
        "sys/memory.max": "1\n",
        "sys/other/memory.max": "1\n",
    }
    assert limits.read(nothing, made_up.write(tmp_path, files)).memory_limit_bytes == 4096


def test_ulimits(tmp_path: Path) -> None:
    table = (
        "Limit                     Soft Limit           Hard Limit           Units\n"
        "Max open files            1024                 524288               files\n"
        "Max locked memory         unlimited            unlimited            bytes\n"
    )
    found = limits.read(nothing, made_up.write(tmp_path, {"proc/self/limits": table}))
    assert (found.open_files, found.memlock_bytes) == (1024, "unlimited")


def test_free_shared_memory(tmp_path: Path) -> None:
    assert limits.read(nothing, tmp_path).shared_memory_bytes is None
    (tmp_path / "dev/shm").mkdir(parents=True)
    free = limits.read(nothing, tmp_path).shared_memory_bytes
    assert free is not None
    # Other programs write to the same disk meanwhile.
    assert abs(free - shutil.disk_usage(tmp_path).free) < 1 << 30


def test_containers_and_machines(tmp_path: Path) -> None:
    answers = {"--container": "none", "--vm": "kvm"}
    found = limits.read(lambda command: answers[command[1]], tmp_path)
    assert (found.container, found.virtual_machine) == ("none", "kvm")
    podman = made_up.write(tmp_path, {"run/.containerenv": ""})
    assert limits.read(nothing, podman).container == "podman"


def test_nothing_is_there(tmp_path: Path) -> None:
    assert limits.read(nothing, tmp_path) == Limits()
    assert limits.cpu_quota(tmp_path) is None
