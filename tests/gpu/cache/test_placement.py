"""Tests which experts are chosen for the GPU."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lvllm.gpu.cache.placement import MARGIN, Placement


def reads(layers: int, experts: int, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 100, (layers, experts), generator=draw).float()


@settings(max_examples=100, deadline=None)
@given(
    layers=st.integers(1, 4),
    experts=st.integers(1, 9),
    slots=st.integers(0, 40),
    seeds=st.lists(st.integers(0, 1000), max_size=6),
    most=st.integers(0, 8),
)
def test_each_slot_has_one_expert(
    layers: int, experts: int, slots: int, seeds: list[int], most: int
) -> None:
    placement = Placement(layers, experts, slots)
    held: dict[int, tuple[int, int]] = {}  # by slot, as one who makes the moves would know it
    for seed in seeds:
        placement.count(reads(layers, experts, seed), 10)
        moves = placement.moves(most)
        assert len(moves) <= most
        for move in moves:
            assert held.get(move.slot) == move.out
            held[move.slot] = (move.layer, move.expert)
        assert sorted(held) == sorted(
            slot for slot in placement.table.flatten().tolist() if slot >= 0
        )
        assert all(placement.table[place] == slot for slot, place in held.items())
        assert len(held) <= min(slots, layers * experts)


def test_the_most_read_experts_of_all_layers_enter() -> None:
    placement = Placement(2, 3, 3)
    placement.count(torch.tensor([[5.0, 0, 9], [7, 1, 0]]), 10)
    entered = [(move.layer, move.expert) for move in placement.moves(9)]
    assert entered == [(0, 2), (1, 0), (0, 0)]
    assert not placement.moves(9)


def test_an_expert_leaves_for_one_that_is_read_clearly_more() -> None:
    placement = Placement(1, 3, 1)
    placement.count(torch.tensor([[100.0, 0, 0]]), 1)
    placement.moves(1)
    placement.scores = torch.tensor([[100.0, 100 * MARGIN, 0]])
    assert not placement.moves(1)
    placement.scores = torch.tensor([[100.0, 100 * MARGIN + 1, 0]])
    (move,) = placement.moves(1)
    assert (move.layer, move.expert, move.slot, move.out) == (0, 1, 0, (0, 0))


def test_counts_are_halved_in_time() -> None:
    placement = Placement(1, 2, 1)
    placement.count(torch.tensor([[64.0, 0]]), 0)
    placement.moves(1)
    for _ in range(5):
        placement.count(torch.tensor([[0.0, 8]]), 512)
    (move,) = placement.moves(1)
    assert move.expert == 1


def test_an_expert_that_was_never_read_takes_a_free_slot_alone() -> None:
    placement = Placement(1, 4, 2)
    assert len(placement.moves(9)) == 2
    assert not placement.moves(9)
