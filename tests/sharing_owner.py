"""A process that owns the layers which `tests.test_sharing` follows.

    python -m tests.sharing_owner NAME SEED

It offers the layers of `layers(SEED)` one by one, each when it reads a line from its input. Before
each layer it prints a line with the number of bytes that it holds.
"""

import sys
from typing import Any

import torch

from lvllm import engine, sharing
from lvllm.engine import bank
from tests.random_layers import Layer, Random, random_layer

LARGE = "large"


def layers(seed: int) -> dict[str, Layer]:
    """A layer of every format with awkward shapes, and one that takes many pages."""
    random = Random(seed)
    gpt_oss: dict[str, Any] = {"activation": "swigluoai", "interleaved": True, "bias": True}
    made = {
        "bf16": random_layer(random, "bf16", 3, 47, 33),
        "fp16": random_layer(random, "fp16", 3, 66, 130, activation="relu2"),
        "fp8": random_layer(random, "fp8", 2, 200, 128, bias_dtype=torch.float32, bias=True),
        "int8": random_layer(random, "int8", 3, 70, 50),
        "int4": random_layer(random, "int4", 3, 96, 160, group_size=32, zero=True),
        "int4_rows": random_layer(random, "int4", 2, 66, 34, group_size=-1),
        "mxfp4": random_layer(random, "mxfp4", 3, 64, 96, **gpt_oss),
        "nvfp4": random_layer(random, "nvfp4", 3, 48, 80),
    }
    return made | {LARGE: random_layer(random, "bf16", 8, 1024, 1024)}  # 48 MiB


def main() -> None:
    name, seed = sys.argv[1], int(sys.argv[2])
    engine.configure(threads=1, shared=True)
    owner = sharing.join(name)
    assert isinstance(owner, sharing.Owner)
    made = []
    for layer, random in layers(seed).items():
        print(layer, bank.allocated_bytes(), flush=True)
        sys.stdin.readline()
        stored = owner.in_shared_memory(random.arguments)
        made.append(engine.ExpertLayer(**stored))
        owner.publish(layer, stored, made[-1])
    print("all", bank.allocated_bytes(), flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main()
