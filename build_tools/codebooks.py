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
    of_iq1 = _grid(IQ1_S) * 8 + 16
    books = [_words("Iq1Times8Plus16", of_iq1)]
    for name, table, offset in (
        ("Iq2Xxs", IQ2_XXS, 64),
        ("Iq2Xs", IQ2_XS, 64),
        ("Iq2S", IQ2_S, 64),
        ("Iq3Xxs", IQ3_XXS, 64),
        ("Iq3S", IQ3_S, 16),
    ):
        grid = _grid(table)
        books += [_words(name, grid), _words(f"{name}Plus{offset}", grid + offset)]
        books += _levels(name, grid + offset, f"Plus{offset}")
    return f"""// Written by build_tools/codebooks.py from the gguf package.
#pragma once

#include <cstdint>

namespace lk::codebooks {{

// The integers of IQ4_NL and IQ4_XS, made unsigned.
{_array("uint8_t", "kIq4NlPlus128", (value + 128 for value in IQ4_NL.kvalues))}
// The entries of the other types, four numbers a word, the first one in its low byte. An entry of
// IQ1 and IQ2 has two words. Those of IQ2 and IQ3 are magnitudes: signs are with the weights. Each
// number is higher by as much as the array's name says.
//
// A table of IQ2 or IQ3 has few different numbers, the levels. In 16 bits, an entry has the level
// of each of its numbers: four bits for each of IQ3's, the first in the lowest ones; two bits for
// each of the eight of IQ2, the even ones in the low byte, the odd ones in the high byte. Those of
// larger tables are there as bytes, first the low ones of all entries.
{"".join(books)}
}}  // namespace lk::codebooks
"""


def _grid(table: Any) -> Any:
    """The entries of a type's table, as integers: [entries, 4 or 8]."""
    table.init_grid()
    return table.grid.reshape(table.grid_shape).astype(int)


def _words(name: str, entries: Any) -> str:
    return _array("uint32_t", f"k{name}", entries.astype("<u1").reshape(-1).view("<u4"))


def _levels(name: str, grid: Any, made: str) -> Iterable[str]:
    """The levels of a table, whose numbers are `made` as that says, and its entries in levels."""
    levels = sorted({int(number) for number in grid.flat})
    places = range(0, 16, 4) if grid.shape[1] == 4 else [i % 2 * 8 + i // 2 * 2 for i in range(8)]
    numbers = [
        sum(levels.index(entry[i]) << place for i, place in enumerate(places)) for entry in grid
    ]
    yield _array("uint8_t", f"k{name}Levels{made}", levels + [0] * (16 - len(levels)))
    if grid.shape[1] == 8 and len(grid) > 256:
        halves = [number >> shift & 255 for shift in (0, 8) for number in numbers]
        yield _array("uint8_t", f"k{name}InLevelBytes", halves)
    if len(grid) <= 512:
        yield _array("uint16_t", f"k{name}InLevels", numbers)


def _array(of: str, name: str, values: Iterable[int]) -> str:
    numbers = [int(value) for value in values]
    listed = ", ".join(map(str, numbers))
    return f"alignas(64) constexpr {of} {name}[{len(numbers)}] = {{{listed}}};\n"
