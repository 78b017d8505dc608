"""Attention between the tokens of a picture, whichever comes first: Gemma 4's sliding layers.

vLLM 0.32's attention for CPUs leaves out which tokens are pictures, without a word, so that each
would see only those before it. Its kernel does take a flag for each sequence, whether it is causal:
here a sequence with a picture becomes several over the same cache, one of them the picture.

The kernel takes a window for both sides of such a sequence, and Gemma 4 for the left alone. That is
the same up to the window's 1024 tokens, of which a picture has 280 unless more are asked for.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder

__all__ = ["install", "split"]

Ranges = dict[int, list[tuple[int, int]]]
"""By a sequence's place in the batch: the first and the last position of each picture."""


def install() -> None:
    """In a worker: let the CPU's attention have the pictures of Gemma 4."""
    upstream = CPUAttentionMetadataBuilder.build
    if upstream.__module__ == __name__:
        return

    def build(
        self: Any, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> Any:
        ranges = common_attn_metadata.mm_req_doc_ranges
        if ranges and _is_for_pictures(self):
            common_attn_metadata = split(common_attn_metadata, ranges)
        return upstream(self, common_prefix_len, common_attn_metadata, fast_build)

    CPUAttentionMetadataBuilder.build = build  # type: ignore[method-assign]


def _is_for_pictures(builder: Any) -> bool:
    """Gemma 4's sliding layers have the flag. Its others, of another head size, are causal."""
    layers = get_layers_from_vllm_config(builder.vllm_config, Attention, builder.layer_names)
    return all(layer.mm_prefix_clamp_sliding_window for layer in layers.values())


def split(batch: Any, ranges: Ranges) -> Any:
    """`batch` (CommonAttentionMetadata), in which every picture is a sequence without causality.

    A sequence ends where its last query is, so the text before a picture sees nothing of it, and
    the picture nothing of the text after it.
    """
    starts, ends = batch.query_start_loc_cpu.tolist(), batch.seq_lens.tolist()
    pieces = [
        (row, first, end, causal)
        for row, end in enumerate(ends)
        for first, end, causal in _pieces(
            end - (starts[row + 1] - starts[row]), end, ranges.get(row, [])
        )
    ]
    if all(causal for *_, causal in pieces):
        return batch
    rows, firsts, stops, causal = (list(column) for column in zip(*pieces, strict=True))
    lengths = torch.tensor([stop - first for first, stop in zip(firsts, stops, strict=True)])
    query_start_loc = torch.zeros(len(rows) + 1, dtype=batch.query_start_loc.dtype)
    query_start_loc[1:] = lengths.cumsum(0)
    return replace(
        batch,
        num_reqs=len(rows),
        query_start_loc=query_start_loc,
        query_start_loc_cpu=query_start_loc,
        seq_lens=torch.tensor(stops, dtype=batch.seq_lens.dtype),
        max_query_len=int(lengths.max()),
        block_table_tensor=batch.block_table_tensor[rows],
        causal=torch.tensor(causal, dtype=torch.int32),  # as the kernel takes it
    )


def _pieces(
    first: int, end: int, pictures: list[tuple[int, int]]
) -> Iterator[tuple[int, int, bool]]:
    """The queries [first, end) of a sequence in order: first, end, and whether it is causal."""
    for start, last in sorted(pictures):
        start, stop = max(start, first), min(last + 1, end)
        if start >= stop:
            continue
        if first < start:
            yield first, start, True
        yield start, stop, False
        first = stop
    if first < end:
        yield first, end, True
