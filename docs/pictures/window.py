"""The window of layers on a timeline: copies run ahead of what the GPU computes."""

from docs.pictures.drawing import Picture

WIDTH = 118
LAYERS = range(3, 9)


def draw(picture: Picture) -> None:
    """Draw on 860 by 250 units."""
    for y, name in ((44, "copies"), (98, "GPU computes"), (152, "in the ring")):
        picture.text(20, y + 20, name, anchor="start")
    for number, layer in enumerate(LAYERS):
        left = 125 + WIDTH * number
        picture.box(left, 44, WIDTH - 6, 32, "orange")
        picture.text(left + 56, 65, f"layer {layer}")
        if number < 2:
            continue
        done = layer - 2
        picture.box(left, 98, WIDTH - 6, 32, "green")
        picture.text(left + 56, 119, f"layer {done}")
        picture.box(left, 152, WIDTH - 6, 32)
        picture.text(left + 56, 173, f"{done}, {done + 1}, {done + 2}")
    picture.arrow("M 125 206 H 830")
    picture.text(478, 226, "time", size=11)
    picture.text(
        478,
        28,
        "LVLLM_GPU_PREFETCH_WINDOW=2: layers 4 and 5 are on their way while layer 3 is computed",
    )
