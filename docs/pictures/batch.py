"""The way of a batch through one MoE layer."""

from docs.pictures.drawing import Picture

PATHS = (
    ("on the CPU", "lk reads the experts", "from host memory", "blue"),
    ("streamed", "experts are copied to the GPU", "for long prompts", "orange"),
    ("cached", "experts that are read most", "lie on the GPU", "green"),
    ("resident", "all experts of chosen layers", "lie on the GPU", "green"),
)


def draw(picture: Picture) -> None:
    """Draw on 860 by 330 units."""
    picture.label(230, 16, 400, "vLLM: scheduler, attention, router", colour="grey")
    picture.arrow("M 430 55 V 82")
    picture.label(230, 86, 400, "each MoE layer: tokens and the experts that they chose")
    for number, (name, what, where, colour) in enumerate(PATHS):
        left = 20 + 210 * number
        middle = left + 95
        picture.arrow(f"M 430 125 C 430 150 {middle} 140 {middle} 166")
        picture.label(left, 170, 190, name, what, where, colour=colour)
        picture.arrow(f"M {middle} 243 C {middle} 268 430 255 430 276")
    picture.label(230, 280, 400, "vLLM: adds the shared experts; the next layer", colour="grey")
