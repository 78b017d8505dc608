"""Times the parts of GPU offload without vLLM, each against what limits it.

    python -m benchmarks.gpu_offload [--formats bf16,int4] [--layers 4] [--shape 2048x768x128x8]
        [--trace FILE]

The benchmark prints seven tables: the bus (plain copies from and to pinned memory), the cost of a
host call as a host function and through a mailbox, the experts' products against one product of
large matrices, prefill passes through the ring against their copies and their products alone,
decoding steps in a CUDA graph against the engine's own time, such steps with work of the GPU
between the layers, without and with deferred experts, and such steps with experts in a cache on the
GPU. Then it shows when the copies and products of one pass ran; `--trace` keeps the profiler's
trace of the pass. With `--accelerator host` it runs on the stand-in, which only shows that it runs,
and the order of that pass.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import gpu_callback, gpu_timeline
from lvllm.engine import ExpertLayer, info
from lvllm.gpu import streamed
from lvllm.gpu.accelerator import Accelerator
from lvllm.gpu.cache.expert_cache import open_caches
from lvllm.gpu.devices import open_accelerator
from lvllm.gpu.hybrid import HybridCall, PinnedBuffers
from lvllm.gpu.pairs import Pairs
from lvllm.gpu.products import multiply
from lvllm.gpu.ring import StagingRing
from lvllm.units import GIB
from tests.random_layers import Random, random_layer

GB = 1e9


def seconds(accelerator: Accelerator, work: Callable[[], object], times: int = 5) -> float:
    """Return the median time until the device has done `work`, after a first run."""
    work()
    found = []
    for _ in range(times):
        accelerator.synchronize(accelerator.compute())
        start = time.perf_counter()
        work()
        accelerator.synchronize(accelerator.compute())
        found.append(time.perf_counter() - start)
    return statistics.median(found)


class Rows(list[tuple[object, ...]]):
    """The rows of a table. Each of them is printed as soon as it is measured, too."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def add(self, *row: object) -> None:
        self.append(row)
        print(self._name, *(f"{cell:.4g}" if isinstance(cell, float) else cell for cell in row))


def table(title: str, header: tuple[str, ...], rows: Sequence[tuple[object, ...]]) -> None:
    print(f"\n{title}")
    for row in (header, *rows):
        print(
            "".join(f"{cell:>14.4g}" if isinstance(cell, float) else f"{cell:>14}" for cell in row)
        )


def bus(accelerator: Accelerator, size: int) -> tuple[float, float]:
    """Return bytes per second to the device and from it, one copy at a time."""
    host = accelerator.pinned((size,), torch.uint8)
    device = accelerator.device_memory(size, accelerator.compute())

    def copy(target: torch.Tensor, source: torch.Tensor) -> None:
        accelerator.copy(target, source, accelerator.compute())

    there = seconds(accelerator, lambda: copy(device, host))
    back = seconds(accelerator, lambda: copy(host, device))
    return size / there, size / back


def make(format: str, shape: tuple[int, ...], count: int) -> list[ExpertLayer]:
    """Make layers of that shape, all from the values of one random layer."""
    hidden, intermediate, experts, _ = shape
    first = random_layer(Random(1), format, experts, hidden, intermediate)
    return [first.make() for _ in range(count)]


def batch(shape: tuple[int, ...], tokens: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    hidden, _, experts, topk = shape
    random = Random(tokens)
    x = random.normal(tokens, hidden).to(torch.bfloat16)
    ids = random.normal(tokens, experts).topk(topk).indices.int()
    weights = random.uniform(0.1, 1, tokens, topk)
    return x.to(device), ids.to(device), weights.to(device)


def matrix_rate(accelerator: Accelerator) -> float:
    """Return the operations a second of a product of large matrices in bf16, by cuBLAS on a GPU."""
    size = 8192 if accelerator.name == "cuda" else 256
    a = torch.randn(size, size, device=accelerator.device).to(torch.bfloat16)
    return 2 * size**3 / seconds(accelerator, lambda: a @ a)


def prefill(
    accelerator: Accelerator,
    layers: list[ExpertLayer],
    inputs: tuple[torch.Tensor, ...],
    ahead: int,
) -> tuple[float, float, float]:
    """Return seconds per layer: of its copy, of its products, and of a pass over all layers."""
    weights = {number: layer.tensors for number, layer in enumerate(layers)}
    ring = StagingRing(accelerator, weights, ahead, GIB)
    first, (x, ids, router) = layers[0], inputs
    there = {name: tensor.to(accelerator.device) for name, tensor in first.tensors.items()}

    def copies() -> None:
        for number, layer in enumerate(layers):
            for _ in ring.stream(number, [1] * layer.num_experts):
                pass

    def products() -> None:
        pairs = Pairs.sort(ids, router, first.num_experts)
        total = torch.zeros_like(x, dtype=torch.float32)
        multiply(first, there, range(first.num_experts), x, pairs, total)

    def both() -> None:
        for number, layer in enumerate(layers):
            streamed.run(layer, ring, number, *inputs)

    count = len(layers)
    return (
        seconds(accelerator, copies) / count,
        seconds(accelerator, products),
        seconds(accelerator, both) / count,
    )


def pause(accelerator: Accelerator, time_of_one: float) -> Callable[[], None]:
    """Make work for the device that takes that many seconds and none of the host's cores."""
    if accelerator.name == "host":
        return lambda: time.sleep(time_of_one)
    cycles = 1_000_000
    took = seconds(accelerator, lambda: torch.cuda._sleep(cycles))
    return lambda: torch.cuda._sleep(int(cycles * time_of_one / took))


def decode(
    accelerator: Accelerator,
    layers: list[ExpertLayer],
    inputs: tuple[torch.Tensor, ...],
    deferred: int = 0,
    between: Callable[[], None] = lambda: None,
) -> tuple[float, float]:
    """Return seconds per layer: of the engine alone, and in a graph of all layers.

    In the graph, `deferred` experts of each token are deferred, and the device does the work of
    `between` after each layer. Without CUDA, the layers are called without a graph. The engine
    alone is called as often in a row, by a thread that does not sleep in between.
    """
    calls = calls_of(accelerator, layers, inputs)
    if deferred:
        calls[0].first = calls[-1].last = True
        calls[0].buffers.defer(deferred)

    def step() -> None:
        for call in calls:
            call(*inputs)
            between()

    on_host = [argument.cpu() for argument in inputs]

    def engine() -> None:
        for layer in layers:
            layer(*on_host)

    in_graph = seconds(accelerator, in_a_graph(accelerator, step), times=50)
    alone = seconds(accelerator, engine, times=50)
    return alone / len(layers), in_graph / len(layers)


def decode_cached(
    accelerator: Accelerator,
    layers: list[ExpertLayer],
    inputs: tuple[torch.Tensor, ...],
    share: float,
) -> float:
    """Return seconds per layer of `decode`, with this share of each layer's experts in slots."""
    x, ids, router = inputs
    size = sum(tensor.nbytes for layer in layers for tensor in layer.tensors.values())
    (cache,) = open_caches(accelerator, dict(enumerate(layers)), round(share * size))
    calls = calls_of(accelerator, layers, inputs)

    def step() -> None:
        for number, call in enumerate(calls):
            cached = cache.layers[number]
            out = call(x, cached.split(ids), router)
            cached.add(x, ids, router, out, count=True)

    return seconds(accelerator, in_a_graph(accelerator, step), times=50) / len(layers)


def calls_of(
    accelerator: Accelerator, layers: list[ExpertLayer], inputs: tuple[torch.Tensor, ...]
) -> list[HybridCall]:
    """Return a call of each layer, for batches of this size."""
    topk = inputs[1].shape[1]
    sizes = [(layers[0].hidden_size, topk)] * len(layers)
    buffers = PinnedBuffers(accelerator, len(inputs[0]), sizes)
    return [HybridCall(buffers, layer, topk) for layer in layers]


def in_a_graph(accelerator: Accelerator, step: Callable[[], None]) -> Callable[[], object]:
    """Return what runs the step: a graph on CUDA, and else the step itself."""
    if accelerator.name != "cuda":
        return step
    step()
    accelerator.synchronize(accelerator.compute())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def show_timeline(
    accelerator: Accelerator,
    layers: list[ExpertLayer],
    inputs: tuple[torch.Tensor, ...],
    ahead: int,
    trace: Path | None,
) -> None:
    if accelerator.name == "host":
        times = gpu_timeline.of_host(layers, inputs, ahead)
    else:
        with tempfile.TemporaryDirectory() as folder:
            file = trace or Path(folder, "trace.json")
            times = gpu_timeline.timeline(accelerator, layers, inputs, ahead, file)
    print(f"\na pass of {len(layers)} layers, {len(inputs[0])} tokens")
    print(gpu_timeline.draw(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--accelerator", default="cuda", choices=["cuda", "host"])
    parser.add_argument("--formats", default="bf16,fp8,int8,int4,mxfp4,nvfp4")
    parser.add_argument("--shape", default="2048x768x128x8", help="HxIxExTOP_K")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--ahead", type=int, default=1)
    parser.add_argument("--prefill", default="512,2048,8192,32768", help="tokens")
    parser.add_argument("--decode", default="1,4,16", help="tokens")
    parser.add_argument("--trace", type=Path, help="where the profiler's trace of a pass goes")
    a = parser.parse_args()
    accelerator = open_accelerator(a.accelerator)
    shape = tuple(int(size) for size in a.shape.split("x"))
    print(f"{info().isa}, {info().threads} threads, {accelerator.device}, shape {a.shape}")
    there, back = bus(accelerator, 1 << (30 if a.accelerator == "cuda" else 20))
    table("bus, GB/s", ("to the GPU", "back"), [(there / GB, back / GB)])
    if a.accelerator == "cuda":
        header = ("", "in a stream", "in a graph")
        table("an empty call of the host, us", header, gpu_callback.costs(accelerator))
    rate = matrix_rate(accelerator)
    rates, passes, steps, apart, kept = map(
        Rows, ("products", "prefill", "decoding", "deferred", "cached")
    )
    formats, timed = a.formats.split(","), [int(tokens) for tokens in a.prefill.split(",")]
    for format in formats:
        layers = make(format, shape, a.layers)
        for layer in layers:
            for tensor in layer.tensors.values():
                accelerator.pin(tensor)
        size = sum(tensor.nbytes for tensor in layers[0].tensors.values())
        for tokens in timed:
            inputs = batch(shape, tokens, accelerator.device)
            copy, products, whole = prefill(accelerator, layers, inputs, a.ahead)
            on_host = [argument.cpu() for argument in inputs]
            cpu = seconds(accelerator, lambda: layers[0](*on_host), times=1)  # noqa: B023
            row = (copy, products, whole, cpu)
            hidden, intermediate, _, topk = shape
            reached = 2 * tokens * topk * 3 * hidden * intermediate / products
            rates.add(format, tokens, 1e3 * products, reached / 1e12, reached / rate)
            speed = size / copy / there
            longer = max(copy, products)
            passes.add(format, tokens, *(1e3 * t for t in row), speed, whole / longer)
        if format == formats[0]:
            inputs = batch(shape, timed[-1], accelerator.device)
            show_timeline(accelerator, layers, inputs, a.ahead, a.trace)
        for tokens in map(int, a.decode.split(",")):
            alone, graph = decode(accelerator, layers, batch(shape, tokens, accelerator.device))
            steps.add(format, tokens, 1e6 * alone, 1e6 * graph, 1e6 * (graph - alone))
        inputs = batch(shape, 1, accelerator.device)
        alone, _ = decode(accelerator, layers, inputs)
        work = pause(accelerator, alone / 2)
        without = 0.0
        for count in (0, shape[3] // 4, shape[3] // 2):
            _, took = decode(accelerator, layers, inputs, count, work)
            without = without or took
            apart.add(format, count, 1e6 * alone, 1e6 * took, took / without)
        whole_layer = 0.0
        for share in (1 / shape[2], 0.25, 0.5, 1.0):
            took = decode_cached(accelerator, layers, inputs, share)
            whole_layer = whole_layer or took
            kept.add(format, share, 1e6 * took, took / whole_layer)
        for layer in layers:
            for tensor in layer.tensors.values():
                accelerator.unpin(tensor)
    table(
        f"products of a layer; one of large matrices reaches {rate / 1e12:.4g} TFLOP/s",
        ("format", "tokens", "ms", "TFLOP/s", "share"),
        rates,
    )
    table(
        "prefill, a layer: copy through the ring, products, pass, and the CPU's time, ms;\n"
        "speed of the copy against a plain one; pass against the longer of copy and products",
        ("format", "tokens", "copy", "products", "pass", "CPU", "copy speed", "overlap"),
        passes,
    )
    table(
        "decoding, a layer, us: the engine alone, in a graph, the difference (at most 60)",
        ("format", "tokens", "engine", "graph", "more"),
        steps,
    )
    table(
        "decoding a token, a layer, us: the engine alone, then with half as much work of the GPU\n"
        "after each layer; times of no deferred experts",
        ("format", "deferred", "engine", "both", "times"),
        apart,
    )

    table(
        "decoding a token, a layer, us, with a share of the experts in the GPU's cache; times of\n"
        "one expert",
        ("format", "share", "both", "times"),
        kept,
    )


if __name__ == "__main__":
    main()
