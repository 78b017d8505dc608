"""Tests GPU offload on a GPU, without vLLM.

`python3 -m tests.gpu.on_device.step 1` runs these tests. Tests that do not need CUDA run on the
stand-in, too, so that they are known to be correct before they meet a GPU.
"""

from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest
import torch

from lvllm import engine
from lvllm.engine import ExpertLayer, bank
from lvllm.engine.weight_formats import ALL_FORMATS, BLOCK_FORMATS
from lvllm.gpu import streamed
from lvllm.gpu.accelerator import Accelerator
from lvllm.gpu.cache import expert_cache, placement, reads
from lvllm.gpu.devices import open_accelerator
from lvllm.gpu.hybrid import HybridCall, PinnedBuffers
from lvllm.gpu.offload import Offload, mark_step
from lvllm.gpu.resident_layer import ResidentLayer
from lvllm.gpu.ring import StagingRing
from tests.random_layers import FORMATS, Layer, Random, random_layer

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 256, 160, 12, 4
T = TypeVar("T")
BATCHES = [1, 2, 4, 8, *range(16, 257, 16)]
"""The batch sizes for which vLLM captures graphs, up to 256 requests."""


@pytest.fixture(params=["host", pytest.param("cuda", marks=pytest.mark.gpu)])
def accelerator(request: pytest.FixtureRequest) -> Iterator[Accelerator]:
    opened = open_accelerator(request.param)
    yield opened
    opened.synchronize(opened.compute())


@pytest.fixture
def cuda() -> Accelerator:
    return open_accelerator("cuda")


def batch(
    random: Random, tokens: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return x, ids and weights of `tokens` tokens."""
    x = random.normal(tokens, HIDDEN).to(device, torch.bfloat16)
    ids = random.normal(tokens, EXPERTS).topk(TOP_K).indices.int()
    ids[random.uniform(0, 1, tokens, TOP_K) < 0.1] = -1
    return x, ids.to(device), random.uniform(0.1, 1, tokens, TOP_K).to(device)


def expected(layer: ExpertLayer, *arguments: torch.Tensor) -> torch.Tensor:
    """Return the engine's own result."""
    return layer(*(argument.cpu() for argument in arguments))


def biased(random: Random, format: str) -> Layer:
    """Make a layer with biases, whose rows are whole blocks."""
    intermediate = 256 if format in BLOCK_FORMATS else INTERMEDIATE
    group = 128 if format == "int4" else None  # that of most published checkpoints
    return random_layer(random, format, EXPERTS, HIDDEN, intermediate, bias=True, group_size=group)


def layers(random: Random, count: int) -> list[ExpertLayer]:
    """Make layers, whose formats take turns."""
    made = [
        random_layer(random, FORMATS[i % len(FORMATS)], EXPERTS, HIDDEN, INTERMEDIATE)
        for i in range(count)
    ]
    return [layer.make() for layer in made]


def captured(run: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
    """Capture a graph of `run`. Return it, and what `run` returned.

    `run` runs once before, as in vLLM: CUDA loads no kernel during a capture, and Triton compiles
    one more for sizes that 16 divides.
    """
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result


def hybrid(accelerator: Accelerator, made: list[ExpertLayer], tokens: int) -> list[HybridCall]:
    """Make the layers' calls in a stream, for batches of up to `tokens`."""
    buffers = PinnedBuffers(accelerator, tokens, [(HIDDEN, TOP_K)] * len(made))
    return [HybridCall(buffers, layer, TOP_K) for layer in made]


@pytest.mark.parametrize("format", ALL_FORMATS)
def test_streamed_against_float32(accelerator: Accelerator, format: str) -> None:
    random = Random(7)
    layer = biased(random, format)
    engine_layer = layer.make()
    for tensor in engine_layer.tensors.values():
        accelerator.pin(tensor)
    ring = StagingRing(accelerator, {3: engine_layer.tensors}, ahead=1, limit=1 << 30)
    x, ids, weights = batch(random, 301, accelerator.device)
    got = streamed.run(engine_layer, ring, 3, x, ids, weights).float().cpu()
    want = layer.reference(x.cpu(), ids.cpu(), weights.cpu())
    assert torch.linalg.norm(got - want) <= 6e-3 * torch.linalg.norm(want)
    accelerator.synchronize(accelerator.compute())
    for tensor in engine_layer.tensors.values():
        accelerator.unpin(tensor)


@pytest.mark.parametrize("format", ALL_FORMATS)
def test_resident_against_float32(accelerator: Accelerator, format: str) -> None:
    """A graph has the same results, without a wait for the host on the way."""
    random = Random(8)
    layer = biased(random, format)
    experts = layer.make()
    resident = ResidentLayer(accelerator, experts)
    assert not experts.tensors
    for tokens in (1, 40):
        x, ids, weights = batch(random, tokens, accelerator.device)
        got = resident.run(x, ids, weights)
        want = layer.reference(x.cpu(), ids.cpu(), weights.cpu())
        assert torch.linalg.norm(got.float().cpu() - want) <= 6e-3 * torch.linalg.norm(want)
        if accelerator.name == "cuda":
            graph, again = captured(lambda: resident.run(x, ids, weights))  # noqa: B023
            graph.replay()
            assert torch.equal(again, got)


@pytest.mark.gpu
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tokens", [1, 40, 700])
def test_sums_are_the_same_each_time(format: str, tokens: int, cuda: Accelerator) -> None:
    layer = random_layer(Random(5), format, EXPERTS, HIDDEN + 24, INTERMEDIATE + 8).make()
    for tensor in layer.tensors.values():
        cuda.pin(tensor)
    ring = StagingRing(cuda, {0: layer.tensors}, ahead=0, limit=1 << 30)
    _, ids, weights = batch(Random(tokens), tokens, cuda.device)
    x = Random(6).normal(tokens, HIDDEN + 24).to(cuda.device, torch.bfloat16)
    first, second = (streamed.run(layer, ring, 0, x, ids, weights) for _ in range(2))
    assert torch.equal(first, second)
    want = expected(layer, x, ids, weights).float()
    # On the CPU, 4-bit experts round activations to 8 bits.
    assert torch.linalg.norm(first.cpu().float() - want) <= 2e-2 * torch.linalg.norm(want)
    for tensor in layer.tensors.values():
        cuda.unpin(tensor)


def test_an_offload_of_many_layers(accelerator: Accelerator) -> None:
    """Passes have random sizes. Some are streamed, and some run on the CPU."""
    random = Random(3)
    made = layers(random, 9)
    offload = Offload(accelerator, tokens=200, threshold=100, ahead=2)
    numbers = [3 + 2 * i for i in range(len(made))]
    for number in numbers:
        Offload.announce(number, offload, lambda: offload)
    added = [
        offload.add(number, f"layer {number}", layer, TOP_K)
        for number, layer in zip(numbers, made, strict=True)
    ]
    for _ in range(6):
        tokens = int(random.integers(1, 200, 1))
        x, ids, weights = batch(random, tokens, accelerator.device)
        results = [layer.run(x, ids, weights) for layer in added]
        for layer, got in zip(made, results, strict=True):
            want = expected(layer, x, ids, weights)
            if tokens < 100:
                assert torch.equal(got.cpu(), want)
            else:
                error = torch.linalg.norm(got.cpu().float() - want.float())
                # On the CPU, 4-bit experts round activations to 8 bits.
                assert error <= 2e-2 * torch.linalg.norm(want.float())


def in_two_engines(layer: Layer) -> list[ExpertLayer]:
    """Make a layer whose tensors lie together in shared memory, and a second one on a read-only
    mapping of this memory, as another engine has it.
    """
    stored = {
        name: value.float() if "bias" in name else value
        for name, value in layer.arguments.items()
        if isinstance(value, torch.Tensor)
    }
    sizes = [-(-tensor.nbytes // 64) * 64 for tensor in stored.values()]
    engine.configure(shared=True)
    try:
        memory = bank.allocate((1, sum(sizes)), torch.uint8)[0]
    finally:
        engine.configure()
    descriptor, _, size = bank.shared_place(memory)
    made: list[ExpertLayer] = []
    for whole in (memory, bank.map_shared(descriptor, size)[: len(memory)]):
        places = {
            name: part[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for (name, tensor), part in zip(stored.items(), whole.split(sizes), strict=True)
        }
        if not made:
            for name, place in places.items():
                place.copy_(stored[name])
        made.append(ExpertLayer(**layer.arguments | places, ordered=bool(made)))
    return made


@pytest.mark.parametrize("format", ["bf16", "int4"])
def test_experts_of_another_engine(accelerator: Accelerator, format: str) -> None:
    """Both paths work. Pages with several tensors are pinned, and read-only pages, too."""
    random = Random(21)
    layer = random_layer(random, format, EXPERTS, HIDDEN, INTERMEDIATE, bias=True)
    made = in_two_engines(layer)
    offload = Offload(accelerator, tokens=64, threshold=20, ahead=1)
    numbers = range(len(made))
    for number in numbers:
        Offload.announce(number, offload, lambda: offload)
    added = [offload.add(number, f"layer {number}", made[number], TOP_K) for number in numbers]
    for tokens in (7, 50):
        x, ids, weights = batch(random, tokens, accelerator.device)
        mine, theirs = (one.run(x, ids, weights).float().cpu() for one in added)
        assert torch.equal(mine, theirs)
        want = layer.reference(x.cpu(), ids.cpu(), weights.cpu())
        bound = {16: 6e-3, 8: 1.5e-2}[made[0].activation_bits]
        assert torch.linalg.norm(mine - want) <= bound * torch.linalg.norm(want)


@pytest.mark.gpu
def test_graphs_of_every_batch_size(cuda: Accelerator) -> None:
    """Capture the layers of a model, and replay each graph with new values in the same memory."""
    random = Random(9)
    made = layers(random, 3)
    calls = hybrid(cuda, made, 256)
    graphs = {}
    for tokens in reversed(BATCHES):
        inputs = batch(random, tokens, cuda.device)
        graph, results = captured(lambda: [call(*inputs) for call in calls])  # noqa: B023
        graphs[tokens] = graph, inputs, results
    for _ in range(3):
        for graph, inputs, results in graphs.values():
            for place, new in zip(inputs, batch(random, len(inputs[0]), cuda.device), strict=True):
                place.copy_(new)
            graph.replay()
            for layer, got in zip(made, results, strict=True):
                assert torch.equal(got.cpu(), expected(layer, *inputs))


@pytest.mark.gpu
def test_ten_thousand_steps_are_the_first(cuda: Accelerator) -> None:
    random = Random(13)
    made = layers(random, 2)  # The calls do not keep their layers.
    calls = hybrid(cuda, made, 4)
    x, ids, weights = batch(random, 4, cuda.device)
    graph, result = captured(lambda: calls[1](calls[0](x, ids, weights), ids, weights))
    graph.replay()
    want = result.clone()
    different = torch.zeros((), dtype=torch.int64, device=cuda.device)
    for _ in range(10_000):
        result.fill_(float("nan"))
        graph.replay()
        different += (result != want).sum()
    assert different.item() == 0


@pytest.mark.gpu
def test_capturing_a_streamed_batch_goes_to_the_cpu(cuda: Accelerator) -> None:
    random = Random(17)
    (layer,) = layers(random, 1)
    offload = Offload(cuda, tokens=64, threshold=8)
    Offload.announce(0, offload, lambda: offload)
    added = offload.add(0, "layer 0", layer, TOP_K)
    inputs = batch(random, 64, cuda.device)
    graph = torch.cuda.CUDAGraph()
    # Outside of the capture it would be streamed. All of its kernels were compiled before.
    with torch.cuda.graph(graph):
        got = added.run(*inputs)
    graph.replay()
    assert torch.equal(got.cpu(), expected(layer, *inputs))


@pytest.mark.gpu
def test_graphs_read_the_slots_of_now(cuda: Accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts are replaced between the replays of graphs, and all replays are right."""
    monkeypatch.setattr(reads, "EVERY", 2)
    monkeypatch.setattr(expert_cache, "EVERY", 2)
    monkeypatch.setattr(placement, "HALF_LIFE", 6)
    random = Random(19)
    made = [random_layer(random, "int4", EXPERTS, HIDDEN, INTERMEDIATE).make() for _ in range(3)]
    slots = 10 * sum(tensor.nbytes for tensor in made[0].tensors.values()) // EXPERTS
    offload = Offload(cuda, tokens=64, cache_bytes=slots)
    for number in range(3):
        Offload.announce(number, offload, lambda: offload)
    added = [offload.add(n, f"layer {n}", layer, TOP_K) for n, layer in enumerate(made)]
    (cache,) = offload.caches
    graphs = []
    for tokens in (32, 5, 1):
        inputs = batch(random, tokens, cuda.device)
        graph, results = captured(lambda: [one.run(*inputs) for one in added])  # noqa: B023
        graphs.append((graph, inputs, results))
    seen = set()
    for step in range(240):
        graph, inputs, results = graphs[int(random.integers(0, 3, 1))]
        x, ids, weights = batch(random, len(inputs[0]), cuda.device)
        favourites = (ids % 3 + step // 80 * 4).where(ids >= 0, ids)
        for place, new in zip(inputs, (x, favourites, weights), strict=True):
            place.copy_(new)
        graph.replay()
        mark_step()
        for layer, got in zip(made, results, strict=True):
            want = expected(layer, *inputs).float()
            error = torch.linalg.norm(got.cpu().float() - want)
            # On the CPU, 4-bit experts round activations to 8 bits.
            assert error <= 2e-2 * torch.linalg.norm(want)
        seen.add(tuple(tuple(cache.holds(n) or ()) for n in range(3)))
    assert len(seen) > 5
