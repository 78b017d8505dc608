"""Sequences with pictures, split for a kernel that is causal or not for each sequence."""

import random
from dataclasses import dataclass
from typing import Any

import torch

from lvllm.patches.picture_attention import Ranges, split


@dataclass
class Batch:
    """The fields of vLLM's CommonAttentionMetadata that count here."""

    num_reqs: int
    query_start_loc: torch.Tensor
    query_start_loc_cpu: torch.Tensor
    seq_lens: torch.Tensor
    max_query_len: int
    block_table_tensor: torch.Tensor
    causal: Any = True


def batch(queries: list[int], lengths: list[int]) -> Batch:
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    tables = torch.arange(len(queries)).int()[:, None]
    return Batch(len(queries), starts, starts, torch.tensor(lengths).int(), max(queries), tables)


def seen(given: Batch) -> list[tuple[int, list[int]]]:
    """By query: its sequence (by its blocks), and the positions of the keys that it sees."""
    found = []
    starts, lengths = given.query_start_loc.tolist(), given.seq_lens.tolist()
    causal = [True] * given.num_reqs if given.causal is True else given.causal.tolist()
    for i in range(given.num_reqs):
        queries = starts[i + 1] - starts[i]
        for place in range(lengths[i] - queries, lengths[i]):
            keys = range(place + 1 if causal[i] else lengths[i])
            found.append((int(given.block_table_tensor[i, 0]), list(keys)))
    return found


def test_a_token_sees_what_is_before_it_and_its_own_picture() -> None:
    draw = random.Random(random.getrandbits(32))
    for _ in range(200):
        lengths = [draw.randrange(1, 40) for _ in range(draw.randrange(1, 5))]
        pictures: Ranges = {}
        queries = []
        for row, length in enumerate(lengths):
            # Pairs of neighbouring cuts: two pictures may touch, as may a picture and an end.
            cuts = sorted(draw.sample(range(length + 1), min(4, length + 1) // 2 * 2))
            pictures[row] = [(a, b - 1) for a, b in zip(cuts[::2], cuts[1::2], strict=True)]
            # A step never begins inside of a picture but where the rest of it is cached.
            queries.append(draw.randrange(1, length + 1))
        expected = [
            (row, [k for k in range(length) if k <= q or _together(pictures[row], k, q)])
            for row, (length, count) in enumerate(zip(lengths, queries, strict=True))
            for q in range(length - count, length)
        ]
        given = batch(queries, lengths)
        assert seen(split(given, pictures)) == expected


def test_a_batch_whose_pictures_are_behind_stays_as_it_is() -> None:
    given = batch([1, 3], [20, 9])
    assert split(given, {0: [(2, 18)], 1: [(0, 5)]}) is given


def _together(pictures: list[tuple[int, int]], k: int, q: int) -> bool:
    return any(first <= k <= last and first <= q <= last for first, last in pictures)
