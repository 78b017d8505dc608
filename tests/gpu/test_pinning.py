"""Tests the registration of pages, with a device that is as strict as CUDA."""

import gc
from collections import Counter
from random import Random as Draw
from random import randrange

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lvllm.gpu.pinning import PageRanges, PinnedTensors
from lvllm.gpu.stand_in import StandInAccelerator

PAGE = 16


class Device:
    """A device that knows which ranges are registered, and refuses the next one if told to."""

    def __init__(self) -> None:
        self.ranges: dict[int, int] = {}
        self.settled = True
        self.refuses = False

    def register(self, address: int, size: int) -> None:
        if self.refuses:
            self.refuses = False
            raise RuntimeError("no")
        assert address % PAGE == size % PAGE == 0
        assert size > 0
        for begin, other in self.ranges.items():
            assert address + size <= begin or begin + other <= address, "registered already"
        self.ranges[address] = size

    def unregister(self, address: int) -> None:
        assert self.settled, "copies may be under way"
        del self.ranges[address]

    def settle(self) -> None:
        self.settled = True


def pages_of(address: int, size: int) -> set[int]:
    return set(range(address // PAGE, (address + size - 1) // PAGE + 1))


@settings(max_examples=200)
@given(st.data())
def test_tensors_come_and_go(data: st.DataObject) -> None:
    """Every tensor can be copied, and no other page is registered."""
    device = Device()
    ranges = PageRanges(device.register, device.unregister, device.settle, PAGE)
    here: Counter[tuple[int, int]] = Counter()
    for _ in range(data.draw(st.integers(1, 25), "steps")):
        device.settled = False
        leaves: bool = data.draw(st.booleans(), "leaves")
        if here and leaves:
            tensor = data.draw(st.sampled_from(sorted(here.elements())), "tensor")
            here -= Counter([tensor])
            ranges.remove(*tensor)
        else:
            tensor = data.draw(st.tuples(st.integers(100, 400), st.integers(1, 70)), "tensor")
            before = dict(device.ranges)
            inside = any(b <= tensor[0] and sum(tensor) <= b + size for b, size in before.items())
            device.refuses = data.draw(st.booleans(), "refused") and not inside
            if device.refuses:  # The ranges before can be registered again.
                with pytest.raises(RuntimeError, match="no"):
                    ranges.add(*tensor)
                assert device.ranges == before
                continue
            ranges.add(*tensor)
            here[tensor] += 1
        registered = [pages_of(begin, size) for begin, size in device.ranges.items()]
        assert set().union(*registered) == set().union(*(pages_of(*tensor) for tensor in here))
        for tensor in here:  # A copy has to lie in one range.
            assert any(pages_of(*tensor) <= pages for pages in registered)


def test_large_tensors_stay_as_they_are() -> None:
    """Only tensors that share pages are registered anew."""
    device, calls = Device(), []

    def register(address: int, size: int) -> None:
        calls.append((address, size))
        device.register(address, size)

    ranges = PageRanges(register, device.unregister, device.settle, PAGE)
    for address, size in ((0, 10 * PAGE), (10 * PAGE, 100 * PAGE), (200 * PAGE + 3, 5)):
        ranges.add(address, size)
    assert calls == [(0, 10 * PAGE), (10 * PAGE, 100 * PAGE), (200 * PAGE, PAGE)]
    ranges.add(200 * PAGE + 8, 5)
    assert len(calls) == 3
    ranges.add(200 * PAGE + 13, 5)
    assert calls[3:] == [(200 * PAGE, 2 * PAGE)]


def test_tensors_are_kept_and_may_leave_in_the_middle_of_another() -> None:
    """A finaliser may run while a new model is loaded."""
    first = [torch.zeros(n) for n in (3, 700, 5)]
    kept = {tensor.data_ptr(): tensor.nbytes for tensor in first}
    seen = []

    def register(address: int, size: int) -> None:
        seen.append(address)
        if len(seen) > 3 and first:
            for tensor in first:
                pinned.unpin(tensor)
            first.clear()
            assert pinned._kept.keys() >= kept.keys()  # Nothing leaves during this call.

    pinned = PinnedTensors(register, lambda address: None, lambda: None)
    for tensor in first:
        pinned.pin(tensor)
    while len(seen) < 4:  # The last one has pages of its own.
        last = torch.zeros(1 << 20)
        pinned.pin(last)
    del tensor
    gc.collect()
    assert pinned._kept.keys().isdisjoint(kept.keys() - {last.data_ptr()})
    pinned.unpin(last)
    with pytest.raises(ValueError, match=r"^a tensor of 4194304 bytes was never pinned$"):
        pinned.unpin(last)


def test_a_model_of_small_tensors() -> None:
    """Biases and scales share pages. The stand-in refuses what CUDA would refuse."""
    draw = Draw(randrange(1 << 30))
    accelerator = StandInAccelerator()
    tensors = [torch.zeros(draw.choice((1, 30, 500, 3000, 100_000))) for _ in range(200)]
    for tensor in tensors:
        accelerator.pin(tensor)
    draw.shuffle(tensors)
    for tensor in tensors:
        accelerator.unpin(tensor)
    assert not accelerator._registered
    accelerator.close()
