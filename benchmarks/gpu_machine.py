"""Times what a machine does for GPU offload: pinning, and decoding while weights are copied.

    python -m benchmarks.gpu_machine [--accelerator host] [--gib 4] [--layers 24] [--tokens 4096]

Memory is pinned as the engine has it: in its own pages, in shared memory, and in a read-only
mapping of that. Decoding steps are timed alone, and while copies of 1 GiB keep the bus busy. At
last many layers get a long batch each on the CPU at once, with a watchdog of 2 s, which must not
end them.
"""

import time
from typing import Annotated

import torch
import typer

from benchmarks.gpu_offload import batch, decode, make, table
from lvllm import engine
from lvllm.engine import bank
from lvllm.gpu import Offload, Watchdog, host_calls
from lvllm.gpu.accelerator import Accelerator, Stream
from lvllm.gpu.devices import open_accelerator
from lvllm.units import GIB

SHAPE = (2048, 768, 16, 8)
"""Qwen3-30B-A3B's widths with an eighth of its experts, which all batches of more than a few tokens
choose."""


def pinning(accelerator: Accelerator, size: int) -> list[tuple[object, ...]]:
    """Return what is pinned, and the GB/s of pinning and of unpinning it."""
    engine.configure(shared=True)
    shared = bank.allocate((1, size), torch.uint8)[0]
    engine.configure()
    own = bank.allocate((1, size), torch.uint8)[0]
    descriptor, _, whole = bank.shared_place(shared)
    others = bank.map_shared(descriptor, whole)[:size]
    rows: list[tuple[object, ...]] = []
    for name, memory in (("own", own), ("shared", shared), ("read-only", others)):
        memory.count_nonzero()  # All pages are there.
        begin = time.perf_counter()
        accelerator.pin(memory)
        pinned = time.perf_counter()
        accelerator.unpin(memory)
        end = time.perf_counter()
        rows.append((name, size / 1e9 / (pinned - begin), size / 1e9 / (end - pinned)))
    return rows


def busy(accelerator: Accelerator, size: int) -> Stream:
    """Queue copies to the device that follow each other for seconds, and return their stream."""
    stream = accelerator.stream()
    host = accelerator.pinned((size,), torch.uint8)
    device = accelerator.device_memory(size, stream)
    for _ in range(200):  # 4 s at 55 GB/s. The host queues them in milliseconds.
        accelerator.copy(device, host, stream)
    return stream


def watched(accelerator: Accelerator, count: int, tokens: int) -> float:
    """Return the seconds in which `count` layers compute a batch each, queued at once."""
    late: list[str] = []
    watchdog = Watchdog(accelerator, 2, late.append, host_calls)
    offload = Offload(accelerator, tokens=tokens, watchdog=watchdog)
    layers = make("bf16", SHAPE, count)
    for number in range(count):
        Offload.announce(number, offload, lambda: offload)
    added = [offload.add(i, f"layer {i}", layer, SHAPE[3]) for i, layer in enumerate(layers)]
    inputs = batch(SHAPE, tokens, accelerator.device)
    begin = time.perf_counter()
    for layer in added:
        layer.run(*inputs)
    accelerator.synchronize(accelerator.compute())
    if late:
        raise SystemExit(f"the watchdog ended a healthy pass: {late[0]}")
    return time.perf_counter() - begin


def main(
    accelerator: Annotated[str, typer.Option(help="cuda, or host to see that it runs")] = "cuda",
    gib: Annotated[float, typer.Option(help="how much is pinned")] = 4,
    layers: Annotated[int, typer.Option(help="of the pass under a watchdog")] = 24,
    tokens: Annotated[int, typer.Option(help="of that pass")] = 4096,
) -> None:
    """Time pinning, decoding beside copies, and a pass under a watchdog."""
    device = open_accelerator(accelerator)
    rows = pinning(device, int(gib * GIB))
    table("pinning, GB/s", ("memory", "pinned", "unpinned"), rows)
    made, inputs = make("int4", SHAPE, 8), batch(SHAPE, 1, device.device)
    steps = []
    size = GIB if accelerator == "cuda" else 1 << 20
    for name in ("alone", "beside copies"):
        copies = busy(device, size) if name != "alone" else device.compute()
        steps.append((name, *(1e6 * seconds for seconds in decode(device, made, inputs))))
        device.synchronize(copies)
    table("decoding, a layer, us", ("", "engine", "graph"), steps)
    took = watched(device, layers, tokens)
    print(f"\n{layers} layers of {tokens} tokens, queued at once: {took:.1f} s, no step was late")


if __name__ == "__main__":
    typer.run(main)
