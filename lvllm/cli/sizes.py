"""Sizes of memory as options take them: 24G, 512GiB, 1.5T."""

import re

import typer

from lvllm.units import GIB

__all__ = ["size"]

_UNITS = {"K": GIB >> 20, "M": GIB >> 10, "G": GIB, "T": GIB << 10}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([KMGT])(?:i?B)?", re.IGNORECASE)


def size(text: str) -> int:
    """Bytes of a size. G is 2**30 bytes, as makers of memory count.

    Raises typer.BadParameter for anything else, with the reason.
    """
    found = _SIZE.fullmatch(text.strip())
    bytes_ = int(float(found[1]) * _UNITS[found[2].upper()]) if found else 0
    if bytes_ <= 0:
        raise typer.BadParameter(f"{text!r} is no size such as 24G, 1.5T or 512GiB")
    return bytes_
