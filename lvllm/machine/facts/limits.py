"""What this process may take of the machine: cgroups of both versions, ulimits, containers."""

import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Literal

from lvllm.machine.facts.commands import Run
from lvllm.machine.facts.cpu import status_field
from lvllm.machine.facts.files import id_list, number, text, word
from lvllm.machine.report import Limit, Limits

__all__ = ["cpu_quota", "read"]

NO_LIMIT = 1 << 60
"""Version 1 writes a limit of almost 2^63 where there is none."""


def read(run: Run, root: Path = Path("/")) -> Limits:
    """The limits by the files below `root` and by systemd-detect-virt."""
    groups = list(_groups(root))
    versions = sorted({version for version, _, _ in groups})
    none: Literal["unlimited"] | None = "unlimited" if groups else None
    ulimits = text(root / "proc/self/limits") or ""
    return Limits(
        cgroup_version=_version_text(versions),
        # Every group on the way to the root limits the process, so the least limit counts.
        cpu_quota_cpus=min(_quotas(groups), default=none),
        memory_limit_bytes=min(_memory_limits(groups), default=none),
        memory_used_bytes=_memory_used(groups),
        allowed_memory_nodes=id_list(status_field(root, "Mems_allowed_list")),
        memlock_bytes=_ulimit(ulimits, "Max locked memory"),
        open_files=_ulimit(ulimits, "Max open files"),
        shared_memory_bytes=_free(root / "dev/shm"),
        container=_container(run, root),
        virtual_machine=run(["systemd-detect-virt", "--vm"]) or None,
    )


def _free(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def cpu_quota(root: Path = Path("/")) -> float | None:
    """The CPUs whose time this process's cgroup gets; None without a limit."""
    return min(_quotas(list(_groups(root))), default=None)


def _version_text(versions: list[str]) -> Literal["1", "2", "1 and 2"] | None:
    if versions == ["1", "2"]:
        return "1 and 2"
    return "1" if versions == ["1"] else "2" if versions == ["2"] else None


def _groups(root: Path) -> Iterator[tuple[str, str, Path]]:
    """(version, controllers, folder) of each cgroup of this process, from its own to the root's.

    A container may see only a part of the folders, and the path in /proc/self/cgroup may be that of
    the host. Then only the root's folder is there, which is the container's own.
    """
    mounts = root / "sys/fs/cgroup"
    for line in (text(root / "proc/self/cgroup") or "").splitlines():
        parts = line.split(":", 2)
        if len(parts) != 3 or "\0" in line:
            continue
        _, controllers, path = parts
        version = "1" if controllers else "2"
        names = [controllers, *controllers.split(",")] if controllers else ["", "unified"]
        below = PurePosixPath(*(part for part in path.split("/") if part not in ("", "..", ".")))
        for name in names:
            if "/" in name or name in (".", ".."):
                continue
            for folder in (below, *below.parents):
                place = mounts / name / folder
                try:
                    there = place.is_dir()
                except (OSError, ValueError):
                    there = False
                if there:
                    yield version, controllers, place


def _quotas(groups: list[tuple[str, str, Path]]) -> Iterator[float]:
    for version, _, folder in groups:
        if version == "2":
            words = (text(folder / "cpu.max") or "").split()
            quota, period = (number(w) for w in words) if len(words) == 2 else (None, None)
        else:
            quota = number(word(folder / "cpu.cfs_quota_us"))  # -1 without a limit
            period = number(word(folder / "cpu.cfs_period_us"))
        if quota and period:
            yield quota / period


def _memory_limits(groups: list[tuple[str, str, Path]]) -> Iterator[int]:
    for version, _, folder in groups:
        name = "memory.max" if version == "2" else "memory.limit_in_bytes"
        limit = number(word(folder / name))
        if limit is not None and limit < NO_LIMIT:
            yield limit


def _memory_used(groups: list[tuple[str, str, Path]]) -> int | None:
    for version, _, folder in groups:
        name = "memory.current" if version == "2" else "memory.usage_in_bytes"
        used = number(word(folder / name))
        if used is not None:
            return used
    return None


def _ulimit(lines: str, name: str) -> Limit:
    """The soft limit, which counts."""
    for line in lines.splitlines():
        if line.startswith(name):
            soft = next(iter(line.removeprefix(name).split()), None)
            return "unlimited" if soft == "unlimited" else number(soft)
    return None


def _container(run: Run, root: Path) -> str | None:
    found = run(["systemd-detect-virt", "--container"])
    if found and found != "none":
        return found
    for file, kind in ((".dockerenv", "docker"), ("run/.containerenv", "podman")):
        if text(root / file) is not None:
            return kind
    return found or None
