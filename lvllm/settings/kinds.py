"""The kinds of values that settings have: what is allowed, and how it is read.

A value comes from a variable, as text, or from YAML, as text, a whole number, a boolean or a list.
A whole number in a text means the same as the number, so that both sources have the same rules.
A boolean is a switch's value and no number.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, StrictBool, TypeAdapter

from lvllm.settings.use_weight import UseWeights
from lvllm.units import GIB

__all__ = ["LAYERS", "PROMPT", "SIZES", "SWITCH", "USE_WEIGHT", "Kind", "choice", "whole"]

MOST = 2**31 - 1
"""The largest number that the engine and vLLM count tokens in."""
MOST_LAYER = 9999
"""No model has a thousand layers. A larger bound would let a range take much memory."""


@dataclass(frozen=True)
class Kind:
    """The values of a setting.

    `read` takes what a user wrote, which is not empty, and returns the setting's value. It raises
    ValueError for what is not `allowed`.
    """

    allowed: str
    read: Callable[[Any], Any]


def whole(minimum: int, maximum: int = MOST, *words: str, most: str | None = None) -> Kind:
    """A whole number, or one of `words`. `most` describes a maximum that depends on the rest."""
    number: Any = _number(minimum, maximum)
    allowed = f"a whole number from {minimum} to {most or maximum}"
    for word in words:
        number |= Literal[word]
        allowed += f", or {word}"
    return Kind(allowed, _reader(number))


def choice(values: type[StrEnum] | tuple[str, ...]) -> Kind:
    """One of several words."""
    *others, last = tuple(values)
    allowed = f"{', '.join(others)} or {last}"
    words: Any = Literal[values] if isinstance(values, tuple) else values
    return Kind(allowed, _reader(words))


def _reader(kind: Any) -> Callable[[Any], Any]:
    """A function that returns a value of a pydantic type, or raises ValueError."""
    read: Callable[[Any], Any] = TypeAdapter(kind).validate_python
    return read


def _number(minimum: int, maximum: int) -> Any:
    """A pydantic type: a whole number, which a text writes in plain decimal digits."""
    return Annotated[
        int, Field(strict=True, ge=minimum, le=maximum), BeforeValidator(_number_of_a_text)
    ]


def _number_of_a_text(written: object) -> object:
    """A text of plain decimal digits as a number. No bound has more digits than the ten of MOST."""
    if isinstance(written, str) and re.fullmatch("0|[1-9][0-9]{,9}", written):
        return int(written)
    return written


def _tokens(number: int | str) -> int | str:
    if number == 1:
        raise ValueError
    return number


def _layers(written: object) -> tuple[int, ...]:
    """Layer indices and ascending ranges, such as `0`, `0-1`, `0,1,8-9` or the list `[0, 8-9]`.

    The result is sorted, and names each layer once.
    """
    parts = written if isinstance(written, list) else str(written).split(",")
    ranges = sorted(_range(part) for part in parts)
    layers: list[int] = []
    for first, last in ranges:
        layers += range(max(first, layers[-1] + 1 if layers else 0), last + 1)
    return tuple(layers)


def _range(part: object) -> tuple[int, int]:
    """The first and the last layer of one part."""
    number = "0|[1-9][0-9]{,3}"
    match = re.fullmatch(f"({number})(?:-({number}))?", str(part))
    if match is None:
        raise ValueError
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise ValueError
    return first, last


def _sizes(written: object) -> tuple[int | str, ...]:
    """Sizes in GiB or `auto`, such as `4`, `0.5`, `4,auto` or the list `[4, 0.5]`, in bytes."""
    parts = written if isinstance(written, list) else str(written).split(",")
    sizes: list[int | str] = []
    for part in parts:
        if part == "auto":
            sizes.append("auto")
        elif re.fullmatch(r"(0|[1-9][0-9]{,5})(\.[0-9]{1,6})?", str(part)):
            sizes.append(round(float(part) * GIB))
        else:
            raise ValueError
    if not sizes:
        raise ValueError
    return tuple(sizes)


SWITCH = Kind(
    "0 or 1",
    _reader(Annotated[StrictBool | _number(0, 1), AfterValidator(bool)]),
)
LAYERS = Kind(
    f"layer indices from 0 to {MOST_LAYER} and ascending ranges, such as 0 or 0-1 or 0,9 or"
    " 0,1,8-9",
    _layers,
)
SIZES = Kind(
    "a number of GiB from 0 to 999999, or auto, or a list such as 4,10 with one for each GPU",
    _sizes,
)
PROMPT = Kind(
    f"0, auto or a whole number from 2 to {MOST}",
    # A user who means 1 as a switch would get every prompt moved.
    _reader(Annotated[_number(0, MOST) | Literal["auto"], AfterValidator(_tokens)]),
)
USE_WEIGHT = Kind(
    "TO_DTYPE, KEEP, INT4, INT8 or FP8, or a list of rules for layers", UseWeights.parse
)
