"""Draws docs/numa.svg: `python docs/numa_picture.py > docs/numa.svg`."""

from xml.sax.saxutils import escape

WIDTH, HEIGHT = 860, 520
COLOURS = ("#cfe3f7", "#fbe3c4")  # of node 0 and node 1
shapes: list[str] = []


def box(x: int, y: int, width: int, height: int, fill: str = "none") -> None:
    shapes.append(
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="4" fill="{fill}" '
        'stroke="#444"/>'
    )


def text(x: int, y: int, words: str, *, size: int = 13, anchor: str = "middle") -> None:
    shapes.append(
        f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}">{escape(words)}</text>'
    )


def arrow(path: str, *, dashed: bool = False) -> None:
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    shapes.append(
        f'<path d="{path}" fill="none" stroke="#444" stroke-width="1.5"{dash} '
        'marker-end="url(#head)"/>'
    )


def part(x: int, y: int, name: str, tiles: int, mine: int, node: int) -> None:
    """One part of an expert: `mine` of its `tiles`, which begin at tile 0 or at the middle."""
    size = 21
    text(x, y + 15, name, anchor="start")
    for tile in range(tiles):
        fill = COLOURS[node] if tile // mine == node else "white"
        box(x + 46 + tile * size, y, size - 3, 20, fill)


# The machine: each node with its cores, its queue of pieces and its memory.
for node in range(2):
    left = 20 + node * 430
    box(left, 20, 390, 310)
    text(left + 195, 42, f"NUMA node {node}", size=15)
    for core in range(3):
        x = left + 25 + core * 115
        box(x, 56, 105, 44, COLOURS[node])
        worker = 3 * node + core
        text(x + 52, 75, f"core {worker}")
        text(x + 52, 92, "the caller" if worker == 0 else f"thread lk-{worker}", size=11)
    box(left + 25, 140, 335, 28, "white")
    text(left + 192, 159, f"queue {node}: pieces of the coloured tiles, in order")
    arrow(f"M {left + 120} 102 V 136")
    text(left + 128, 124, "claims the next piece", size=11, anchor="start")
    arrow(f"M {left + 192} 170 V 198")
    box(left + 25, 202, 335, 112, "white")
    text(left + 192, 220, f"memory of node {node}: its tiles of every expert")
    for row, (name, tiles) in enumerate((("gate", 12), ("up", 12), ("w2", 12))):
        part(left + 40, 228 + 28 * row, name, tiles, 6, node)

# Helping, once the own queue is empty.
arrow("M 370 100 C 405 118 405 140 447 152", dashed=True)
arrow("M 490 100 C 455 118 455 140 387 152", dashed=True)
shapes.append('<rect x="380" y="176" width="100" height="36" fill="white"/>')
text(430, 190, "own queue empty:", size=11)
text(430, 204, "help the other", size=11)

# The phases of a call.
steps = (
    ("pack x", "by token"),
    ("gate, up, activation", "by rows of w13"),
    ("down", "by rows of w2"),
    ("combine", "by token"),
)
text(
    430,
    366,
    "One call: every worker goes through the phases, and waits for all between two",
    size=15,
)
for number, (what, how) in enumerate(steps):
    x = 30 + number * 210
    box(x, 386, 170, 52, "#eeeeee")
    text(x + 85, 408, what)
    text(x + 85, 427, how, size=11)
    if number:
        arrow(f"M {x - 38} 412 H {x - 4}")
text(
    430,
    468,
    "Waiting: up to 500 us spinning inside a call, 50 us after it, then asleep on a futex.",
)
text(
    430,
    490,
    "A tile is 64 rows. A sum over K is never split between workers: same bits on any machine.",
)

print(
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
    'font-family="sans-serif" fill="#222">\n'
    '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
    'markerHeight="7" orient="auto"><path d="M 0 0 L 8 4 L 0 8 z" fill="#444"/></marker></defs>\n'
    f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
)
print("\n".join(shapes))
print("</svg>")
