"""lvllm.engine.bank: memory that is placed, lazily filled and given back."""

import gc
import resource

import pytest
import torch

from lvllm import engine
from lvllm.engine import bank

MIB = 1 << 20


def test_shape_dtype_and_zeros() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.uint8, torch.float32):
        tensor = bank.allocate((3, 10, 7), dtype, parts=2)
        assert tensor.shape == (3, 10, 7)
        assert tensor.dtype == dtype
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % (2 * MIB) == 0
        assert not tensor.view(torch.uint8).any()


def test_memory_goes_back_with_the_last_view() -> None:
    before = bank.allocated_bytes()
    tensor = bank.allocate((2, 1024, 1024), torch.bfloat16)
    assert bank.allocated_bytes() - before == 4 * MIB
    row = tensor[1, 5]
    row.fill_(3)
    del tensor
    gc.collect()
    assert bank.allocated_bytes() - before == 4 * MIB
    assert (row == 3).all()
    del row
    gc.collect()
    assert bank.allocated_bytes() == before


@pytest.mark.skipif(len(engine.topology().nodes) > 1, reason="several nodes: pages are placed")
def test_pages_come_when_written() -> None:
    tensor = bank.allocate((8, 1024, 1024), torch.bfloat16)
    assert set(bank.page_nodes(tensor)) == {-1}
    tensor[0].fill_(1)
    nodes = bank.page_nodes(tensor)
    pages_of_an_expert = 2 * MIB // 4096
    assert -1 not in nodes[:pages_of_an_expert]
    assert set(nodes[pages_of_an_expert:]) == {-1}


def test_resident_memory_is_what_was_written() -> None:
    """Sizes that do not end on a huge page, the worst case for filling more than was asked for."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tensors = [bank.allocate((1, 3, MIB + 4096), torch.uint8).fill_(1) for _ in range(64)]
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown <= 64 * 3 * (MIB + 4096) + 8 * MIB
    assert len(tensors) == 64


def test_too_much_is_refused_with_the_numbers() -> None:
    with pytest.raises(MemoryError, match=r"cannot allocate 3\d{4,}\.\d\d GiB .* are free"):
        bank.allocate((1 << 16, 1 << 18, 1 << 10), torch.bfloat16)


def test_what_is_promised_counts() -> None:
    """Untouched allocations will be filled later, so they cannot be promised again."""
    part = bank.available_bytes() * 2 // 3
    first = bank.allocate((1, part), torch.uint8)
    with pytest.raises(MemoryError, match="promised to earlier weights"):
        bank.allocate((1, part), torch.uint8)
    del first
    gc.collect()
    bank.allocate((1, part), torch.uint8)


@pytest.mark.parametrize(
    ("shape", "parts", "message"),
    [
        ((4,), 1, "shape is"),
        ((4, 0, 2), 1, "shape is"),
        ((4, 5, 2), 2, "parts is 2, must divide the 5 rows"),
        ((4, 5, 2), 0, "parts is 0"),
        ((True, 2), 1, "shape is"),
        ((2.0, 2), 1, "shape is"),
        ((bank.MOST_BLOCKS + 1, 1), 1, "allowed are 131072 experts times parts"),
        ((1, bank.MOST_BLOCKS + 1), bank.MOST_BLOCKS + 1, "allowed are 131072 experts times parts"),
        ((1 << 63, 1), 1, "allowed are 131072 experts times parts"),
        ((1, 1 << 47), 1, "allowed are 140737488355328 bytes"),
        ((1, 10**30), 1, "allowed are 140737488355328 bytes"),
        ((1, 1, 1 << 40, 1 << 40), 1, "allowed are 140737488355328 bytes"),
    ],
)
def test_wrong_arguments(shape: tuple[int, ...], parts: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bank.allocate(shape, torch.bfloat16, parts=parts)


def test_the_most_experts_and_the_operator_itself() -> None:
    most = bank.MOST_BLOCKS
    assert bank.allocate((most // 2, 2), torch.uint8, parts=2).shape == (most // 2, 2)
    # The operator checks for itself, so that no caller can make it place pages without end.
    with pytest.raises(ValueError, match="65537 experts x 2 parts: at most 131072"):
        torch.ops.lvllm.allocate(most // 2 + 1, 2, 1, 1)
