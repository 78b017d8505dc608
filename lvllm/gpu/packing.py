"""Where the tensors of some experts lie in one piece of the device's memory."""

from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

import torch

from lvllm.units import ceil_div

__all__ = ["ALIGNMENT", "Part", "Signature", "expert_bytes", "packed_bytes", "signature", "views"]

ALIGNMENT = 256
"""The alignment of each tensor in bytes. Kernels load 16 bytes at a time, and CUDA aligns its own
allocations to this."""


class Part(NamedTuple):
    """One of the tensors that an expert has."""

    name: str
    """ExpertLayer's argument."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int


Signature: TypeAlias = tuple[Part, ...]
"""What an expert has. Experts of one signature fit in the same places."""


def signature(tensors: Mapping[str, torch.Tensor]) -> Signature:
    """Return the signature of a layer's experts. Each tensor [E, ...] has an entry an expert."""
    return tuple(
        Part(name, of.dtype, tuple(of.shape[1:]), of.nbytes // len(of))
        for name, of in tensors.items()
    )


def expert_bytes(of: Signature) -> int:
    """Return the bytes of an expert."""
    return sum(part.nbytes for part in of)


def packed_bytes(of: Signature, experts: int) -> int:
    """Return the bytes of so many experts' tensors, each of them aligned."""
    return sum(_aligned(experts * part.nbytes) for part in of)


def views(of: Signature, experts: int, memory: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return, by name, the tensors [experts, ...] in uint8 [packed_bytes(of, experts) or more]."""
    found, begin = {}, 0
    for part in of:
        size = experts * part.nbytes
        found[part.name] = memory[begin : begin + size].view(part.dtype).view(experts, *part.shape)
        begin += _aligned(size)
    return found


def _aligned(size: int) -> int:
    return ceil_div(size, ALIGNMENT) * ALIGNMENT
