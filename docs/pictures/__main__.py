"""Writes the pictures of the documentation: `python -m docs.pictures`."""

from collections.abc import Callable, Iterator
from pathlib import Path

from docs.pictures import batch, memory, numa, window
from docs.pictures.chinese import CHINESE
from docs.pictures.drawing import Picture

FOLDER = Path(__file__).parent
DRAWN: dict[str, tuple[Callable[[Picture], None], int, int]] = {
    "batch": (batch.draw, 860, 330),
    "memory": (memory.draw, 860, 330),
    "numa": (numa.draw, 860, 520),
    "window": (window.draw, 860, 250),
}


def pictures() -> Iterator[tuple[Path, str]]:
    """Each file and its text. Those in Chinese are for pages that have a translation."""
    for name, (draw, width, height) in DRAWN.items():
        for suffix, words in (("", {}), (".zh", CHINESE)):
            if suffix and name == "numa":
                continue
            picture = Picture(width, height, words)
            draw(picture)
            yield FOLDER / f"{name}{suffix}.svg", picture.svg()


if __name__ == "__main__":
    for file, text in pictures():
        file.write_text(text)
