"""The tables of numbers that ggml's types look weights up in, as a C++ header.

They come from the `gguf` package, which defines these types together with llama.cpp.
"""

from collections.abc import Iterable
from pathlib import Path

from build_tools.errors import BuildError

__all__ = ["HEADER", "write"]

HEADER = Path("lk", "codebooks.h")


def write(folder: Path) -> None:
    """Write HEADER below `folder`, unless it is there already. Raises BuildError without gguf."""
    text = _text()
    header = folder / HEADER
    # A new time stamp would compile all kernels again.
    if not header.exists() or header.read_text() != text:
        header.parent.mkdir(parents=True, exist_ok=True)
        header.write_text(text)


def _text() -> str:
    try:
        from gguf.quants import IQ4_NL
    except ImportError:
        raise BuildError(
            "gguf is not installed, which has the tables of its types: "
            "pip install -r requirements/build.txt"
        ) from None
    return f"""// Written by build_tools/codebooks.py from the gguf package.
#pragma once

#include <cstdint>

namespace lk::codebooks {{

// The integers of IQ4_NL and IQ4_XS, made unsigned.
{_array("uint8_t", "kIq4NlPlus128", (value + 128 for value in IQ4_NL.kvalues))}
}}  // namespace lk::codebooks
"""


def _array(of: str, name: str, values: Iterable[int]) -> str:
    numbers = [int(value) for value in values]
    listed = ", ".join(map(str, numbers))
    return f"alignas(64) constexpr {of} {name}[{len(numbers)}] = {{{listed}}};\n"
