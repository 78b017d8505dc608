"""A wheel's RECORD lists the files of its `vllm/` tree with hashes, to check a tree against."""

import base64
import csv
import hashlib
from dataclasses import dataclass, field
from pathlib import Path

# Two files in a laid-in tree are not upstream's: our README, and a copy of the wheel's RECORD,
# which says which upstream the tree comes from.
README = "README.md"
STAMP = ".RECORD"


@dataclass
class Differences:
    """How a tree differs from a RECORD: paths relative to the tree, sorted."""

    missing: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.missing or self.changed or self.extra)

    def lines(self) -> list[str]:
        """One line for each path, with what is wrong first."""
        return [f"{what} {path}" for what, paths in vars(self).items() for path in paths]


def parse_record(text: str) -> dict[str, str]:
    """Return the `vllm/` files of a RECORD: path below vllm/ -> `sha256=<urlsafe base64>`."""
    rows = csv.reader(text.splitlines())
    return {row[0].removeprefix("vllm/"): row[1] for row in rows if row[0].startswith("vllm/")}


def digest(data: bytes) -> str:
    """The hash of a file's content as RECORD writes it (PEP 427: base64 without padding)."""
    encoded = base64.urlsafe_b64encode(hashlib.sha256(data).digest())
    return "sha256=" + encoded.rstrip(b"=").decode()


def compare_tree(tree: Path, recorded: dict[str, str]) -> Differences:
    """Compare every file below `tree`, except in __pycache__, with a parsed RECORD."""
    differences = Differences()
    for path, expected in sorted(recorded.items()):
        file = tree / path
        if not file.is_file():
            differences.missing.append(path)
        elif file.is_symlink() or digest(file.read_bytes()) != expected:
            differences.changed.append(path)
    ours = {README, STAMP}
    for file in sorted(tree.rglob("*")):
        path = file.relative_to(tree).as_posix()
        is_file = file.is_symlink() or not file.is_dir()
        if is_file and path not in recorded and path not in ours and "__pycache__" not in path:
            differences.extra.append(path)
    return differences
