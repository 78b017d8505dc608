"""The tables of numbers that ggml's types look weights up in, as a C++ header.

They come from the `gguf` package, which defines these types together with llama.cpp.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

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
        from gguf.quants import IQ1_S, IQ2_S, IQ2_XS, IQ2_XXS, IQ3_S, IQ3_XXS, IQ4_NL
    except ImportError:
        raise BuildError(
            "gguf is not installed, which has the tables of its types: "
            "pip install -r requirements/build.txt"
        ) from None
    books = [
        _array("uint32_t", f"k{name}", _words(table, scale, offset))
        for name, table, scale, offset in (
            ("Iq2Xxs", IQ2_XXS, 1, 0),
            ("Iq2Xs", IQ2_XS, 1, 0),
            ("Iq2S", IQ2_S, 1, 0),
            ("Iq3Xxs", IQ3_XXS, 1, 0),
            ("Iq3S", IQ3_S, 1, 0),
            ("Iq1Times8Plus16", IQ1_S, 8, 16),
        )
    ]
    return f"""// Written by build_tools/codebooks.py from the gguf package.
#pragma once

#include <cstdint>

namespace lk::codebooks {{

// The integers of IQ4_NL and IQ4_XS, made unsigned.
{_array("uint8_t", "kIq4NlPlus128", (value + 128 for value in IQ4_NL.kvalues))}
// The entries of the other types, four numbers a word, the first one in its low byte. An entry of
// IQ1 and IQ2 has two words. Those of IQ2 and IQ3 are magnitudes: signs are with the weights.
{"".join(books)}
}}  // namespace lk::codebooks
"""


def _words(table: Any, scale: int, offset: int) -> list[int]:
    """The entries of a type's table, each number times `scale` plus `offset`, as words."""
    table.init_grid()
    numbers = (table.grid * scale + offset).astype("<u1")
    return list(numbers.reshape(-1).view("<u4"))


def _array(of: str, name: str, values: Iterable[int]) -> str:
    numbers = [int(value) for value in values]
    listed = ", ".join(map(str, numbers))
    return f"alignas(64) constexpr {of} {name}[{len(numbers)}] = {{{listed}}};\n"
