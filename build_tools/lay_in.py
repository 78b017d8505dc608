"""Lay the `vllm/` tree of an upstream wheel into the checkout, whole or not at all."""

import fcntl
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from build_tools.errors import BuildError
from build_tools.record import README, STAMP, compare_tree, digest, parse_record
from build_tools.target import ROOT
from build_tools.upstream import CACHE

TREE = ROOT / "vllm"


def read_record(wheel: Path) -> str:
    """The text of the RECORD in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/RECORD"))
        return archive.read(name).decode()


def lay_in(wheel: Path, tree: Path = TREE, work: Path = CACHE) -> bool:
    """Make `tree` the `vllm/` folder of `wheel`; return False if it already was.

    The new tree is extracted and checked in `work`, which must be on the file system of `tree`.
    Then it takes the old tree's place by a rename. A call that is interrupted or fails leaves the
    old tree as it was. `tree`/README.md stays. Edits in the tree stay, too: while the tree comes
    from `wheel` they are not looked at, and a tree with edits is never replaced by another.

    Raises BuildError for a damaged wheel, for edits in the way, and for a full or read-only disk.
    """
    try:
        work.mkdir(parents=True, exist_ok=True)
        with _lock(work / "lock"):
            return _lay_in(wheel, tree, work)
    except (OSError, zipfile.BadZipFile) as error:
        raise BuildError(f"cannot lay {wheel.name} into {tree}: {error}") from error


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _lay_in(wheel: Path, tree: Path, work: Path) -> bool:
    new, old = work / "vllm.new", work / "vllm.old"
    if old.exists() and not tree.exists():
        old.rename(tree)  # An earlier call was killed between its two renames.
    record = read_record(wheel)
    recorded = parse_record(record)
    stamp = tree / STAMP
    same = stamp.exists() and stamp.read_text() == record
    if same and all((tree / path).is_file() for path in recorded):
        return False
    _refuse_edits(tree)

    shutil.rmtree(new, ignore_errors=True)
    extract(wheel, new)
    (new / STAMP).write_text(record)
    if (tree / README).exists():
        shutil.copy2(tree / README, new / README)
    shutil.rmtree(old, ignore_errors=True)
    if tree.exists():
        tree.rename(old)
    try:
        new.rename(tree)
    except BaseException:
        if old.exists():
            old.rename(tree)
        raise
    shutil.rmtree(old, ignore_errors=True)
    return True


def _refuse_edits(tree: Path) -> None:
    stamp = tree / STAMP
    recorded = parse_record(stamp.read_text()) if stamp.exists() else {}
    differences = compare_tree(tree, recorded)
    edits = differences.changed + differences.extra
    if edits:
        shown = ", ".join(edits[:3]) + (", ..." if len(edits) > 3 else "")
        raise BuildError(
            f"{tree} holds {len(edits)} files that are not upstream's ({shown}): "
            "move them away, or `make clean-upstream` to drop them, and build again"
        )


def extract(wheel: Path, destination: Path) -> None:
    """Write the files of vllm/ in `wheel` to `destination`. Raises BuildError if one is damaged."""
    recorded = parse_record(read_record(wheel))
    with zipfile.ZipFile(wheel) as archive:
        for path, expected in recorded.items():
            info = archive.getinfo(f"vllm/{path}")
            data = archive.read(info)
            if digest(data) != expected:
                raise BuildError(f"{wheel} is damaged: vllm/{path} is not what its RECORD says")
            file = destination / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
            if info.external_attr >> 16 & 0o100:
                os.chmod(file, 0o755)
