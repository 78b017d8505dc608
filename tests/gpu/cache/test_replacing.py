"""Tests that steps find in each slot the expert that the table names, while experts move."""

import random
import time
from random import randrange

import pytest
import torch

from lvllm.gpu.cache.placement import Placement
from lvllm.gpu.cache.replacing import Replacing
from lvllm.gpu.cache.slots import Slots
from lvllm.gpu.packing import signature
from tests.gpu.streams import RecordedAhead, uneven

LAYERS, EXPERTS, SLOTS = 3, 7, 6


@pytest.mark.parametrize("slow", [(0.0, 1e-3), (1e-3, 0.0), (5e-4, 5e-4)])
def test_steps_that_are_queued_ahead_find_what_the_table_names(slow: tuple[float, float]) -> None:
    """Each step reads all slots that the table names when its turn comes, some steps later."""
    seed = randrange(1 << 30)
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    accelerator = RecordedAhead(uneven(seed, slow))
    layers = [
        {
            "w13": torch.randint(0, 99, (EXPERTS, 5, 3), generator=generator),
            "w2_scale": torch.randn(EXPERTS, 7, generator=generator),
        }
        for _ in range(LAYERS)
    ]
    copies = accelerator.stream()
    slots = Slots(accelerator, signature(layers[0]), SLOTS, copies)
    replacing = Replacing(accelerator, layers, EXPERTS, slots, copies)
    placement = Placement(LAYERS, EXPERTS, SLOTS)
    found: list[bool] = []

    def read() -> None:
        for layer in range(LAYERS):
            for expert in range(EXPERTS):
                slot = int(replacing.on_device[layer, expert])
                if slot < 0:
                    continue
                for name, of in layers[layer].items():
                    first, *_, last = of[expert].flatten().tolist()
                    has_first, *_, has_last = slots.tensors[name][slot].flatten().tolist()
                    found.append((first, last) == (has_first, has_last))

    lost, end = 0, time.monotonic() + 30
    while lost < 8 and time.monotonic() < end:
        accelerator.launch(read, accelerator.compute())
        if replacing.idle:
            placement.count(torch.rand(LAYERS, EXPERTS, generator=generator) * 1000, 400)
            replacing.add(placement.moves(draw.randrange(4)))
        had = replacing.on_host >= 0
        left = replacing.step(draw.choice([1, 10_000]))
        assert left == bool((had & (replacing.on_host < 0)).any())
        lost += left
        time.sleep(draw.choice([0, 0, 1e-3]))
    replacing.settle()
    accelerator.launch(read, accelerator.compute())
    accelerator.synchronize(accelerator.compute())
    assert lost == 8
    assert found
    assert all(found)
    assert torch.equal(replacing.on_device, placement.table)
    assert torch.equal(replacing.on_host, placement.table)
    accelerator.close()
