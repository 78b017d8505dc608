"""Tests the cache of a model: what it computes and holds while experts are replaced."""

import random
from collections.abc import Iterator
from pathlib import Path
from random import randrange

import pytest
import torch

from lvllm.gpu import offload
from lvllm.gpu.cache import expert_cache, placement, reads
from lvllm.gpu.hybrid import raise_host_call_error
from lvllm.gpu.offload import Offload, mark_step, waiting_for_cache
from lvllm.gpu.offloaded_layer import OffloadedLayer, concentrated_routing
from lvllm.gpu.packing import expert_bytes, signature
from lvllm.gpu.stand_in import StandInAccelerator
from lvllm.units import ceil_div
from tests.gpu.streams import uneven
from tests.random_layers import Layer, Random, random_layer

EXPERTS, HIDDEN, INTERMEDIATE, TOPK, MOST = 9, 96, 64, 3, 24
BOUND = 0.01
"""Of the norms of the parts that a result is the sum of, which may cancel each other. Each side
rounds its result to bfloat16, and its inner sums: some 2^-8."""


class Model:
    """Takes the place of what the layers of a model have in common."""


@pytest.fixture
def accelerator() -> Iterator[StandInAccelerator]:
    accelerator = StandInAccelerator(delay=uneven(randrange(1 << 30), (1e-4, 1e-3)))
    yield accelerator
    accelerator.close()


def make(
    accelerator: StandInAccelerator, formats: list[str], slots: int, **settings: object
) -> tuple[list[Layer], list[OffloadedLayer]]:
    """Make a model with room for so many of its experts.

    Formats of w13 and w2 that differ are written as "q4_1 q5_0".
    """
    draw, one = Random(randrange(1 << 30)), Model()
    given = [
        random_layer(
            draw,
            of.split()[0],
            EXPERTS,
            HIDDEN,
            INTERMEDIATE,
            w2_format=of.split()[-1],
            group_size=32 if "int8 " in of else None,
        )
        for of in formats
    ]
    made = [layer.make(activation_bits=16, w2_activation_bits=16) for layer in given]
    whole = sum(EXPERTS * expert_bytes(signature(layer.tensors)) for layer in made)
    size = ceil_div(slots * whole, EXPERTS * len(made))
    settings = {"cache_bytes": size, "call": "hostfunc"} | settings
    joined = [
        Offload.announce(n, one, lambda: Offload(accelerator, MOST, **settings))  # type: ignore[arg-type]
        for n in range(len(formats))
    ]
    return given, [
        each.add(n, f"layers.{n}", layer, TOPK)
        for each, n, layer in zip(joined, range(len(formats)), made, strict=True)
    ]


def batch(tokens: int, favourites: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make a batch in which most tokens choose their experts among the favourites."""
    draw = Random(randrange(1 << 30))
    few = torch.tensor(favourites)[draw.integers(0, len(favourites), tokens, TOPK)]
    ids = few.where(
        draw.uniform(0, 1, tokens, TOPK) < 0.9, draw.integers(-1, EXPERTS, tokens, TOPK)
    )
    return draw.normal(tokens, HIDDEN).bfloat16(), ids.int(), draw.uniform(0.1, 1, tokens, TOPK)


def check(given: list[Layer], layers: list[OffloadedLayer], tokens: int, few: list[int]) -> None:
    """Run a step, and compare each layer's result with float32."""
    for reference, layer in zip(given, layers, strict=True):
        x, ids, weights = batch(tokens, few)
        out = torch.ops.lvllm.routed_experts(x, ids, weights, layer.experts.handle)
        parts = [
            reference.reference(x.float(), ids[:, n : n + 1], weights[:, n : n + 1])
            for n in range(TOPK)
        ]
        size = sum(map(torch.linalg.norm, parts))
        assert torch.linalg.norm(out.float() - sum(parts)) <= BOUND * size + 1e-6
    mark_step()


def opened(layer: OffloadedLayer) -> expert_cache.ExpertCache:
    """The cache that has slots for a layer."""
    assert isinstance(layer.offload, Offload)
    (found,) = (cache for cache in layer.offload.caches if layer.number in cache.layers)
    return found


@pytest.mark.parametrize("threshold", [0, 10])
def test_results_are_right_while_experts_are_replaced(
    accelerator: StandInAccelerator, monkeypatch: pytest.MonkeyPatch, threshold: int
) -> None:
    """Favourites change, and the cache follows. Some batches are streamed with a threshold."""
    monkeypatch.setattr(reads, "EVERY", 3)
    monkeypatch.setattr(expert_cache, "EVERY", 3)
    monkeypatch.setattr(placement, "HALF_LIFE", 6)
    kind = random.choice(["bf16", "int4", "fp8"])
    # The second layer's experts are larger or smaller, and have slots of their own.
    other = "int8" if kind == "bf16" else "bf16"
    given, layers = make(accelerator, [kind, other, kind], 9, threshold=threshold, ahead=1)
    cache = opened(layers[0])
    assert list(cache.layers) == [0, 2]
    assert opened(layers[2]) is cache
    second = opened(layers[1])
    assert list(second.layers) == [1]
    assert cache.holds(1) is second.holds(0) is None
    for few in ([1, 2], [7, 4], [0, 8]):
        for _ in range(25):
            check(given, layers, random.choice([1, 2, 5, 12, MOST]), few)
        for _ in range(100):
            slots = [opened(layer).holds(layer.number) or [] for layer in layers]
            held = sum(slots[0] + slots[2]), sum(slots[1])
            if held == (6, 3):
                break
            check(given, layers, 1, few)  # Experts are still coming.
        assert held == (6, 3)
        assert all(of_layer[expert] for of_layer in slots for expert in few)


@pytest.mark.parametrize("formats", ["q4_1 q5_0", "int8 iq4_nl"])
def test_types_of_gguf_have_slots(accelerator: StandInAccelerator, formats: str) -> None:
    """Some batches are streamed."""
    given, layers = make(accelerator, [formats, formats], 6, threshold=10, ahead=1)
    for tokens in (1, 5, 12):
        check(given, layers, tokens, [1, 7])
    slots = [opened(layers[0]).holds(number) or [] for number in (0, 1)]
    assert sum(map(sum, slots)) == 6


def test_the_operator_without_tokens(accelerator: StandInAccelerator) -> None:
    given, layers = make(accelerator, ["int4"], 4)
    check(given, layers, 0, [1])
    nothing = torch.full((3, TOPK), -1, dtype=torch.int32)
    x, _, weights = batch(3, [1])
    out = torch.ops.lvllm.routed_experts(x, nothing, weights, layers[0].experts.handle)
    assert torch.equal(out, torch.zeros_like(x))


def test_an_id_that_is_no_expert_is_refused(accelerator: StandInAccelerator) -> None:
    _, layers = make(accelerator, ["int4"], 4)
    x, ids, weights = batch(3, [1])
    ids[1, 1] = EXPERTS
    with pytest.raises(ValueError, match=f"topk_ids has {EXPERTS}"):
        torch.ops.lvllm.routed_experts(x, ids, weights, layers[0].experts.handle)
    # A device does not check ids, but lk does: the step ends with its error.
    with pytest.raises(RuntimeError, match=rf"layers.0.*{EXPERTS}"):
        raise_host_call_error()


def test_all_experts_fit(accelerator: StandInAccelerator) -> None:
    """More memory than all experts take is not taken, and lk gets no experts."""
    _, layers = make(accelerator, ["int4", "int4"], 100)
    cache = opened(layers[0])
    assert cache.nbytes == sum(layer.size() for layer in layers)
    assert cache.holds(0) == cache.holds(1) == [True] * EXPERTS
    for layer in layers:
        assert layer.cache is not None
        assert torch.equal(layer.cache.split(batch(4, [3])[1]), torch.full((4, TOPK), -1).int())


def test_memory_is_measured_for_both(accelerator: StandInAccelerator) -> None:
    """In the context for measuring, others compute what has slots, too."""
    given, layers = make(accelerator, ["bf16"], 100)
    x, ids, weights = batch(4, [3])
    with concentrated_routing():
        out = torch.ops.lvllm.routed_experts(x, ids, weights, layers[0].experts.handle)
    twice = 2 * given[0].reference(x.float(), ids, weights)
    assert torch.linalg.norm(out.float() - twice) <= BOUND * torch.linalg.norm(twice)


def test_a_restart_begins_with_what_was_read(
    accelerator: StandInAccelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reads, "EVERY", 2)
    monkeypatch.setattr(expert_cache, "EVERY", 2)
    monkeypatch.setattr(expert_cache, "SAVE_EVERY", 3)
    path = tmp_path / "a folder" / "reads.safetensors"
    given, layers = make(accelerator, ["int4", "int4"], 4, reads_path=path)
    for _ in range(40):
        check(given, layers, 2, [5, 6])
    del layers
    _, layers = make(accelerator, ["int4", "int4"], 4, reads_path=path)
    for number in (0, 1):
        assert opened(layers[0]).holds(number) == [e in (5, 6) for e in range(EXPERTS)]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_the_end_of_a_short_run_saves_what_was_read(
    accelerator: StandInAccelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written if nothing was read."""
    monkeypatch.setattr(reads, "EVERY", 2)
    monkeypatch.setattr(expert_cache, "EVERY", 2)
    path = tmp_path / "reads.safetensors"
    given, layers = make(accelerator, ["int4", "int4"], 4, reads_path=path)
    opened(layers[0]).save()
    assert not path.exists()
    for _ in range(40):
        check(given, layers, 2, [5, 6])
    assert not path.exists()
    opened(layers[0]).save()
    written = path.stat().st_mtime_ns
    opened(layers[0]).save()
    assert path.stat().st_mtime_ns == written
    del layers
    _, layers = make(accelerator, ["int4", "int4"], 4, reads_path=path)
    for number in (0, 1):
        assert opened(layers[0]).holds(number) == [e in (5, 6) for e in range(EXPERTS)]


def test_a_cache_that_is_opened_later(accelerator: StandInAccelerator) -> None:
    given, layers = make(accelerator, ["int4", "int4"], 0, cache_bytes="auto")
    check(given, layers, 4, [1])
    (waiting,) = waiting_for_cache()
    waiting.open_cache(3 * layers[0].size() // EXPERTS)
    assert not waiting_for_cache()
    # Without counts, the first experts of all layers come first.
    first, second = (opened(layers[0]).holds(number) for number in (0, 1))
    assert (first, second) == ([e < 2 for e in range(EXPERTS)], [e < 1 for e in range(EXPERTS)])
    check(given, layers, 4, [1])


def test_a_size_that_is_rare_has_no_slots(accelerator: StandInAccelerator) -> None:
    """Its share of a small cache holds none of its experts. If that goes for all, one has all."""
    given, layers = make(accelerator, ["int4", "int4", "int4", "bf16"], 3)
    assert sum(map(sum, (opened(layer).holds(layer.number) or [] for layer in layers[:3]))) >= 1
    assert layers[3].cache is None
    check(given, layers, 4, [1])
    size = layers[3].size() // EXPERTS
    given, layers = make(accelerator, ["int4", "bf16"], 0, cache_bytes=size)
    assert layers[0].cache is None
    assert opened(layers[1]).holds(1) == [True] + [False] * (EXPERTS - 1)
    check(given, layers, 4, [0])


def test_counts_of_every_size_are_saved(
    accelerator: StandInAccelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, value in ((reads, 2), (expert_cache, 2)):
        monkeypatch.setattr(module, "EVERY", value)
    monkeypatch.setattr(expert_cache, "SAVE_EVERY", 3)
    path = tmp_path / "reads.safetensors"
    given, layers = make(accelerator, ["int4", "bf16"], 4, reads_path=path)
    for _ in range(40):
        check(given, layers, 2, [5, 6])
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["reads-1.safetensors", "reads.safetensors"]
    del layers
    _, layers = make(accelerator, ["int4", "bf16"], 4, reads_path=path)
    for layer in layers:
        assert opened(layer).holds(layer.number) == [e in (5, 6) for e in range(EXPERTS)]


def test_no_room(accelerator: StandInAccelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"^LVLLM_GPU_EXPERT_CACHE of 0 MiB holds no expert of 0"):
        make(accelerator, ["int4"], 0, cache_bytes=10)

    def full(size: int, stream: object) -> torch.Tensor:
        raise MemoryError("3 bytes are free")

    monkeypatch.setattr(accelerator, "device_memory", full)
    with pytest.raises(MemoryError, match=r"a cache of .* 3 bytes are free; a smaller LVLLM_GPU"):
        make(accelerator, ["int4"], 4)
    assert offload.waiting_for_cache() == []
