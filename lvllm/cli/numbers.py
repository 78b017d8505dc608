"""Lists of whole numbers as options take them: 1,4,16."""

import re

import typer

__all__ = ["numbers"]


def numbers(text: str) -> tuple[int, ...]:
    """Rising whole numbers of at least 1 from a list with commas.

    Raises typer.BadParameter for anything else.
    """
    if not re.fullmatch(r"\s*[0-9]+\s*(,\s*[0-9]+\s*)*", text):
        raise typer.BadParameter(f"{text!r} is no list of whole numbers such as 1,4,16")
    found = sorted({int(part) for part in text.split(",")})
    if found[0] < 1:
        raise typer.BadParameter(f"{text!r}: numbers are at least 1")
    return tuple(found)
