"""Two NUMA nodes with their cores, queues and memory, and the phases of a call."""

from docs.pictures.drawing import Picture

COLOURS = ("blue", "orange")  # of node 0 and node 1


def _part(picture: Picture, x: int, y: int, name: str, tiles: int, mine: int, node: int) -> None:
    """One part of an expert: `mine` of its `tiles`, which begin at tile 0 or at the middle."""
    size = 21
    picture.text(x, y + 15, name, anchor="start")
    for tile in range(tiles):
        fill = COLOURS[node] if tile // mine == node else "white"
        picture.box(x + 46 + tile * size, y, size - 3, 20, fill)


def draw(picture: Picture) -> None:
    """Draw on 860 by 520 units."""
    # The machine: each node with its cores, its queue of pieces and its memory.
    for node in range(2):
        left = 20 + node * 430
        picture.box(left, 20, 390, 310)
        picture.text(left + 195, 42, f"NUMA node {node}", size=15)
        for core in range(3):
            x = left + 25 + core * 115
            picture.box(x, 56, 105, 44, COLOURS[node])
            worker = 3 * node + core
            picture.text(x + 52, 75, f"core {worker}")
            picture.text(
                x + 52, 92, "the caller" if worker == 0 else f"thread lk-{worker}", size=11
            )
        picture.box(left + 25, 140, 335, 28, "white")
        picture.text(left + 192, 159, f"queue {node}: pieces of the coloured tiles, in order")
        picture.arrow(f"M {left + 120} 102 V 136")
        picture.text(left + 128, 124, "claims the next piece", size=11, anchor="start")
        picture.arrow(f"M {left + 192} 170 V 198")
        picture.box(left + 25, 202, 335, 112, "white")
        picture.text(left + 192, 220, f"memory of node {node}: its tiles of every expert")
        for row, (name, tiles) in enumerate((("gate", 12), ("up", 12), ("w2", 12))):
            _part(picture, left + 40, 228 + 28 * row, name, tiles, 6, node)

    # Helping, once the own queue is empty.
    picture.arrow("M 370 100 C 405 118 405 140 447 152", dashed=True)
    picture.arrow("M 490 100 C 455 118 455 140 387 152", dashed=True)
    picture.clear(380, 168, 100, 31)
    picture.text(430, 181, "own queue empty:", size=11)
    picture.text(430, 194, "help the other", size=11)

    # The phases of a call.
    steps = (
        ("pack x", "by token"),
        ("gate, up, activation", "by rows of w13"),
        ("down", "by rows of w2"),
        ("combine", "by token"),
    )
    picture.text(
        430,
        366,
        "One call: every worker goes through the phases, and waits for all between two",
        size=15,
    )
    for number, (what, how) in enumerate(steps):
        x = 30 + number * 210
        picture.box(x, 386, 170, 52, "grey")
        picture.text(x + 85, 408, what)
        picture.text(x + 85, 427, how, size=11)
        if number:
            picture.arrow(f"M {x - 38} 412 H {x - 4}")
    picture.text(
        430,
        468,
        "Waiting: up to 500 us spinning inside a call, 50 us after it, then asleep on a futex.",
    )
    picture.text(
        430,
        490,
        "A tile is 64 rows. A sum over K is never split between workers: same bits on any machine.",
    )
