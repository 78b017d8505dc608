"""Read the small text files in which the kernel describes a machine."""

import re
from pathlib import Path

__all__ = ["MOST_CPUS", "id_list", "number", "numbered", "sizes", "text", "word"]

MOST_CPUS = 1 << 16
"""CPU and node numbers from here on are garbage; Linux has at most 8192 CPUs."""


def text(path: Path) -> str | None:
    """The file's text without blanks around it; None if it cannot be read."""
    try:
        return path.read_bytes().decode(errors="replace").strip()
    except (OSError, ValueError):  # ValueError: the path has a null character.
        return None


def word(path: Path) -> str | None:
    """The file's first word; None if it has none or cannot be read."""
    return next(iter((text(path) or "").split()), None)


def number(written: str | None) -> int | None:
    """A whole number from 0 to 2^63 - 1 in decimal digits; None for anything else."""
    if written is None or not re.fullmatch(r"[0-9]{1,19}", written):
        return None
    value = int(written)
    return value if value < 1 << 63 else None


def id_list(written: str | None) -> list[int] | None:
    """The kernel's list format, such as `0-3,8`, in rising order; None for anything else."""
    if written is None:
        return None
    ids: set[int] = set()
    for part in filter(None, written.split(",")):
        first, dash, last = part.strip().partition("-")
        begin = number(first)
        end = number(last) if dash else begin
        if begin is None or end is None or not begin <= end < MOST_CPUS:
            return None
        ids.update(range(begin, end + 1))
    return sorted(ids)


def numbered(folder: Path, prefix: str) -> dict[int, Path]:
    """The entries of a folder that are named `prefix` and a number, by rising number."""
    try:
        names = [entry.name for entry in folder.iterdir()]
    except (OSError, ValueError):
        return {}
    found = {}
    for name in names:
        value = number(name.removeprefix(prefix)) if name.startswith(prefix) else None
        if value is not None and value < MOST_CPUS:
            found[value] = folder / name
    return dict(sorted(found.items()))


def sizes(path: Path) -> dict[str, int]:
    """The sizes in bytes of a meminfo file, by name.

    Lines of /proc/meminfo are `MemTotal:  24628 kB`, those of a node `Node 0 MemTotal:  24628 kB`.
    """
    found = {}
    for line in (text(path) or "").splitlines():
        name, colon, value = line.partition(":")
        kib = number(next(iter(value.split()), None))
        if colon and name.split() and kib is not None:
            found[name.split()[-1]] = kib * 1024
    return found
