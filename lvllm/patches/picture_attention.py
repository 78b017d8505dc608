"""Attention between the tokens of a picture, whichever comes first: Gemma 4's sliding layers.

vLLM's attention for CPUs ignores which tokens are pictures, without a word, so that each would see
only the tokens before it. Its kernel does take a flag for each sequence that says whether it is
causal. So a sequence with a picture becomes several over the same cache, one of them the picture.

For a sequence that is not causal the kernel applies the window to both sides, where Gemma 4 limits
the left side alone. The result is the same for pictures of up to the window's 1024 tokens; a
picture has 280 unless more are asked for.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from lvllm.patches.registry import MODEL_LOADED, patch

__all__ = ["Ranges", "split", "split_at_pictures"]

Ranges = dict[int, list[tuple[int, int]]]
"""For a sequence's place in the batch: the first and the last position of each picture."""


@patch(
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionMetadataBuilder.build",
    signature="(self, common_prefix_len, common_attn_metadata, fast_build=False)",
    why="vLLM's attention for CPUs ignores which tokens are pictures. In Gemma 4's sliding layers"
    " the tokens of a picture see each other, so a sequence is split around its pictures.",
    upstream="none, because nothing was proposed for CPUs;"
    " https://github.com/vllm-project/vllm/pull/42175 did it for GPUs",
    until="the attention for CPUs heeds mm_req_doc_ranges, as vLLM's others do",
    platform="cpu",
    when=MODEL_LOADED,
)
def split_at_pictures(original: Any) -> Any:
    def build(
        self: Any, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> Any:
        ranges = common_attn_metadata.mm_req_doc_ranges
        if ranges and _is_for_pictures(self):
            common_attn_metadata = split(common_attn_metadata, ranges)
        return original(self, common_prefix_len, common_attn_metadata, fast_build)

    return build


def _is_for_pictures(builder: Any) -> bool:
    """Whether the layers are Gemma 4's sliding ones. Its other layers are causal."""
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention import Attention

    layers = get_layers_from_vllm_config(builder.vllm_config, Attention, builder.layer_names)
    return all(layer.mm_prefix_clamp_sliding_window for layer in layers.values())


def split(batch: Any, ranges: Ranges) -> Any:
    """Return `batch` (CommonAttentionMetadata) with every picture as a non-causal sequence.

    A sequence ends at its last query, so the text before a picture sees nothing of the picture, and
    the picture sees nothing of the text after it.
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
        causal=torch.tensor(causal, dtype=torch.int32),  # the kernel takes a flag a sequence
    )


def _pieces(
    first: int, end: int, pictures: list[tuple[int, int]]
) -> Iterator[tuple[int, int, bool]]:
    """Yield the queries [first, end) of a sequence in order: first, end, whether it is causal."""
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
