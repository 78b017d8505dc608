"""Shapes and words of an SVG picture that is readable on light and on dark pages."""

from xml.sax.saxutils import escape

__all__ = ["Picture"]

LIGHT = {
    "ground": "#ffffff", "ink": "#222222", "line": "#555555", "blue": "#cfe3f7",
    "orange": "#fbe3c4", "green": "#d3ecd0", "grey": "#ececec", "white": "#ffffff",
}  # fmt: skip
DARK = {
    "ground": "#1e2129", "ink": "#e6e6e6", "line": "#a0a6b0", "blue": "#264b70",
    "orange": "#6b4a1c", "green": "#2b5530", "grey": "#363b45", "white": "#1e2129",
}  # fmt: skip

FONT = "font-family=\"system-ui, 'Noto Sans', 'Noto Sans CJK SC', sans-serif\""


def _style(colours: dict[str, str]) -> str:
    fills = [f".{name}{{fill:{colour}}}" for name, colour in colours.items()]
    return "".join([*fills, f".edge{{stroke:{colours['line']}}}"])


class Picture:
    """A picture of `width` by `height` units.

    Words that `translations` has are replaced. The picture has a ground of its own, because the
    colours of a page may be switched without the picture learning of it.
    """

    def __init__(self, width: int, height: int, translations: dict[str, str] | None = None) -> None:
        self.width, self.height = width, height
        self.translations = translations or {}
        self.shapes: list[str] = []

    def box(self, x: int, y: int, width: int, height: int, colour: str = "white") -> None:
        """A rectangle in one of the colours above."""
        self.shapes.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="4" '
            f'class="{colour} edge"/>'
        )

    def clear(self, x: int, y: int, width: int, height: int) -> None:
        """Room for words that lie on lines."""
        self.shapes.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" class="ground"/>'
        )

    def text(self, x: int, y: int, words: str, *, size: int = 13, anchor: str = "middle") -> None:
        """Words on the base line y."""
        shown = escape(self.translations.get(words, words))
        self.shapes.append(
            f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}">{shown}</text>'
        )

    def label(self, x: int, y: int, width: int, *lines: str, colour: str = "white") -> None:
        """A box with a line of words for each of `lines`: the first one large."""
        self.box(x, y, width, 20 + 17 * len(lines), colour)
        for number, words in enumerate(lines):
            self.text(x + width // 2, y + 22 + 17 * number, words, size=11 if number else 13)

    def arrow(self, path: str, *, dashed: bool = False) -> None:
        """A line along an SVG path, with a head at its end."""
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.shapes.append(
            f'<path d="{path}" fill="none" class="edge" stroke-width="1.5"{dash} '
            'marker-end="url(#head)"/>'
        )

    def svg(self) -> str:
        """The file."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'{FONT} class="ink">\n'
            f"<style>{_style(LIGHT)}\n"
            f"@media (prefers-color-scheme: dark){{{_style(DARK)}}}</style>\n"
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            'markerHeight="7" orient="auto"><path d="M 0 0 L 8 4 L 0 8 z" class="line"/></marker>'
            f'</defs>\n<rect width="{self.width}" height="{self.height}" class="ground"/>'
        )
        return "\n".join([head, *self.shapes, "</svg>\n"])
