"""How much of a model a starting server has read, from its log."""

import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["LoadingLog", "Weights"]

BAR = re.compile(rb"Loading weights: +(\d+)%\|[^|\r\n]*\| ([\d.]+[kMGTP]?)/([\d.]+[kMGTP]?) \[")
"""The bar of `lvllm.loading.model_loader`, which counts bytes in powers of 1024."""
LONGEST = 200
"""Bytes of a bar, which may be cut where the log ends at the moment."""


@dataclass(frozen=True)
class Weights:
    """Weights that have been read, most of which are experts, of all that this model has."""

    percent: int
    read: str
    """With its unit, such as `1.15 GiB`."""
    total: str


class LoadingLog:
    """Reads the log of a server while it grows."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._read = 0
        self._rest = b""
        self._weights: Weights | None = None

    def weights(self) -> Weights | None:
        """The newest count; None before the first one. Raises OSError."""
        with self._log.open("rb") as file:
            file.seek(self._read)
            added = file.read()
        self._read += len(added)
        text = self._rest + added
        self._rest = text[-LONGEST:]
        for bar in BAR.finditer(text):
            percent, read, total = (part.decode() for part in bar.groups())
            self._weights = Weights(int(percent), _size(read), _size(total))
        return self._weights


def _size(text: str) -> str:
    """`1.15G` as tqdm writes it, with the unit in full."""
    number, unit = (text[:-1], text[-1].upper()) if text[-1].isalpha() else (text, "")
    return f"{number} {unit}iB" if unit else f"{number} B"
