"""Nothing is read or written beyond the tensors: each ends where a page without access begins.

AddressSanitizer does not see masked vector loads, the processor does.
"""

import ctypes
import mmap
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lvllm import engine
from lvllm.engine import ExpertLayer
from tests.engine.random_case import BOTH, ISAS, even
from tests.random_layers import Random, random_layer

PAGE = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)


def fenced(tensor: torch.Tensor, keep: list[Any]) -> torch.Tensor:
    """A copy whose last byte is the last of a page, with an inaccessible page behind it."""
    size = tensor.numel() * tensor.element_size()
    if size == 0:
        return tensor.clone()
    room = -(-size // PAGE) * PAGE
    area = mmap.mmap(-1, room + PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    assert libc.mprotect(ctypes.c_void_p(start + room), ctypes.c_size_t(PAGE), 0) == 0
    keep.append(area)
    buffer = (ctypes.c_char * size).from_buffer(area, room - size)
    copy = torch.frombuffer(buffer, dtype=torch.uint8).view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


@pytest.fixture(autouse=True)
def defaults() -> Iterator[None]:
    yield
    engine.configure()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("format", "bits"), BOTH)
@pytest.mark.parametrize(
    ("hidden", "intermediate"), [(1, 1), (33, 50), (64, 64), (130, 67), (96, 257)]
)
def test_nothing_beyond_the_end(
    isa: str, format: str, bits: int, hidden: int, intermediate: int
) -> None:
    engine.configure(isa=isa)
    random = Random(hidden)
    keep: list[Any] = []
    layer = random_layer(
        random,
        format,
        3,
        even(format, hidden),
        even(format, intermediate),
        activation_bits=bits,
        bias=True,
    )
    arguments: dict[str, Any] = {
        name: fenced(value, keep) if isinstance(value, torch.Tensor) else value
        for name, value in layer.arguments.items()
    }
    made = ExpertLayer(**arguments)
    for tokens in (1, 2, 5, 17):
        x = fenced(random.normal(tokens, made.hidden_size).bfloat16(), keep)
        ids = fenced(random.integers(0, 3, tokens, 2).int(), keep)
        weights = fenced(random.uniform(0.1, 1.1, tokens, 2), keep)
        got = made(x, ids, weights).float()
        want = layer.reference(x, ids, weights)
        assert (got - want).norm() <= 0.06 * (want.norm() + 1)
