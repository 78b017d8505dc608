"""The launches of the kernels for a batch."""

from typing import Any

import torch

from benchmarks.gpu_kernels.compiled import Launch, recorded
from lvllm.gpu.kernels import exchange, experts, split
from lvllm.gpu.pairs import Pairs
from tests.random_layers import Random, random_layer

__all__ = ["launches"]

HIDDEN, INTERMEDIATE = 512, 768
"""Compiled kernels do not depend on these, if both are multiples of 16. Blocks have 256 weights."""


def launches(format: str, tokens_per_expert: int, **how: Any) -> list[Launch]:
    """Return the launches for a layer of `format` with so many tokens for each expert.

    Further arguments go to `random_layer`.

    First come those for a streamed group, then those for experts in a cache. The last two divide a
    batch for the cache and bring it to the host.
    """
    count, random = 3, Random(1)
    layer = random_layer(random, format, count, HIDDEN, INTERMEDIATE, **how).make()
    x = torch.zeros(tokens_per_expert, HIDDEN, dtype=torch.bfloat16)
    ids = torch.arange(count).repeat(tokens_per_expert, 1)
    pairs = Pairs.sort(ids, torch.ones(ids.shape), count)
    total = torch.zeros(x.shape)
    with recorded() as found:
        experts.multiply(layer, layer.tensors, range(count), x, pairs, total, scratch_bytes=1 << 30)
        table = torch.zeros(count, dtype=torch.int32)
        cached = (layer, layer.tensors, table, x, pairs, total)
        experts.multiply_cached(*cached, scratch_bytes=1 << 30)
        split.run(ids, table)
        exchange.run([(tensor, tensor) for tensor in (x, ids.int(), torch.ones(ids.shape))])
    return found
