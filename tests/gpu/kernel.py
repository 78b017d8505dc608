"""Checks the conversion kernel in Triton's interpreter, which is chosen when it is imported.

It needs a process of its own. Run it as `TRITON_INTERPRET=1 python -m tests.gpu.kernel SEED`.
"""

import sys
from typing import Any

import torch

from lvllm.gpu import convert_kernel
from lvllm.gpu.convert import convert
from tests.random_layers import FORMATS, FOUR_BIT, Random, random_layer

WAYS: dict[str, list[dict[str, Any]]] = {
    "fp8": [{"fp8_scale": kind} for kind in ("block", "channel", "tensor")],
    "int4": [
        {"group_size": group, "zero": zero, "scale_dtype": dtype}
        for group, zero, dtype in (
            (32, False, torch.bfloat16),
            (64, True, torch.float16),
            (-1, True, torch.float32),
        )
    ],
}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    (format, how) for format in FORMATS for how in WAYS.get(format, [{}])
]


def main() -> None:
    random = Random(int(sys.argv[1]))
    for format, how in VARIANTS:
        for activation in ("silu", "relu2"):
            hidden, intermediate = random.integers(1, 160, 2).tolist()
            step = 2 if format in FOUR_BIT else 1
            layer = random_layer(
                random, format, 3, step * hidden, step * intermediate, activation=activation, **how
            )
            engine_layer = layer.make()
            for name, parts in (("w13", engine_layer.parts), ("w2", 1)):
                part = {
                    suffix: engine_layer.tensors[name + suffix][1:]
                    for suffix in ("", "_scale", "_zero", "_global_scale")
                    if name + suffix in engine_layer.tensors
                }
                # This uses float32, since the interpreter rounds to bfloat16 by cutting bits off.
                got = convert_kernel.run(
                    format, engine_layer.group_size, parts, part, torch.float32
                )
                want = convert(engine_layer, engine_layer.tensors, name, range(1, 3), torch.float32)
                if not torch.equal(got, want):
                    raise SystemExit(
                        f"{format} {how} {activation} {name} {hidden} x {intermediate}:"
                        f" {(got != want).sum()} of {want.numel()} differ"
                    )
    print(f"{len(VARIANTS)} variants")


if __name__ == "__main__":
    main()
