"""Writes docs/recipes: `python -m benchmarks.recipes`.

People write the pages about machines, but for the plans in them. Pages about families of models are
generated as a whole, in each language.
"""

from collections.abc import Iterator
from pathlib import Path

from benchmarks.pages import SUFFIXES
from benchmarks.recipes import families, machines

FOLDER = Path(__file__).parents[2] / "docs/recipes"
MACHINES = ("desktop", "one-card", "many-cards", "no-card")


def pages() -> Iterator[tuple[Path, str]]:
    """Each page and its current text."""
    for language, suffix in SUFFIXES.items():
        for name in MACHINES:
            file = FOLDER / f"{name}{suffix}"
            yield file, machines.filled(file.read_text(), language)
        yield FOLDER / f"README{suffix}", families.index(language)
        for name, models in families.rows().items():
            yield FOLDER / f"{name}{suffix}", families.page(name, models, language)


if __name__ == "__main__":
    for file, text in pages():
        file.write_text(text)
