"""What lies in the memory of the host and of a GPU."""

from docs.pictures.drawing import Picture

HOST = (
    (
        "experts, once, in the checkpoint's format",
        "each row on the NUMA node that computes it",
        122,
        "blue",
    ),
    ("without a GPU: other weights, KV cache", "--kv-cache-memory-bytes", 56, "grey"),
    ("pinned buffers, vLLM's processes, the system", "3 GiB in a plan", 44, "white"),
)
GPU = (
    ("attention, router, shared experts, head", "always", 44, "grey"),
    ("experts of resident layers", "LVLLM_GPU_RESIDENT_MOE_LAYERS", 44, "green"),
    ("experts that are read most", "LVLLM_GPU_EXPERT_CACHE", 44, "green"),
    ("ring for copies of experts", "LVLLM_GPU_STAGING_MIB", 44, "orange"),
    ("KV cache and activations", "--gpu-memory-utilization", 44, "grey"),
)


def draw(picture: Picture) -> None:
    """Draw on 860 by 330 units."""
    for left, name, parts in ((20, "host memory", HOST), (490, "memory of each GPU", GPU)):
        picture.box(left, 16, 350, 298)
        picture.text(left + 175, 40, name, size=15)
        top = 54
        for what, setting, height, colour in parts:
            picture.box(left + 15, top, 320, height, colour)
            middle = top + height // 2
            picture.text(left + 175, middle - 3, what)
            picture.text(left + 175, middle + 14, setting, size=11)
            top += height + 7
    picture.arrow("M 372 102 C 430 102 430 232 502 232")
    picture.clear(392, 150, 76, 32)
    picture.text(430, 163, "copied for", size=11)
    picture.text(430, 177, "long prompts", size=11)
