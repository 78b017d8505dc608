"""What the generated pages of the documentation have in common."""

from collections.abc import Sequence

__all__ = ["SUFFIXES", "table"]

SUFFIXES = {"en": ".md", "zh": ".zh.md"}
"""How the names of pages end, by their languages."""


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table, whose first row is the head."""
    head, *body = rows
    lines = [head, tuple("---" for _ in head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
