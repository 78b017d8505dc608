"""Tests how a layer's experts are divided into groups."""

import random

import pytest
import torch

from lvllm.gpu import groups
from lvllm.gpu.groups import LayerGroups
from lvllm.gpu.packing import ALIGNMENT


def layer(experts: int, **sizes: int) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(experts, size, dtype=torch.uint8) for name, size in sizes.items()}


def test_groups_have_at_most_so_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "GROUP_BYTES", 4096)
    made = LayerGroups(3, layer(10, w13=600, w2=400))
    # Each tensor's bytes are rounded up to a multiple of 256.
    assert [made.size(n) for n in (1, 3)] == [768 + 512, 2048 + 1280]
    assert made.most == 4096 // 1280
    assert [*made.divide(range(10))] == [range(0, 3), range(3, 6), range(6, 9), range(9, 10)]
    assert LayerGroups(3, layer(10, w13=5000)).most == 1
    assert LayerGroups(3, layer(2, w13=1)).most == 2


def test_experts_without_tokens_are_in_no_group() -> None:
    made = LayerGroups(3, layer(40, w13=600))
    for _ in range(100):
        some = range(random.randint(0, 20), random.randint(20, 40))
        counts = [random.choice((0, 0, 1, 5)) for _ in range(40)]
        found = [expert for group in made.divide(some, counts) for expert in group]
        assert found == [expert for expert in some if counts[expert]]


def test_tensors_begin_at_multiples_of_256_bytes() -> None:
    made = LayerGroups(0, layer(5, w13=257, w2=3, w2_bias=8))
    memory = torch.arange(made.size(2) + 99) % 251
    views = made.views(range(3, 5), memory.to(torch.uint8)[99:])
    assert [*views] == ["w13", "w2", "w2_bias"]
    start = views["w13"].data_ptr()
    assert [(view.data_ptr() - start) % ALIGNMENT for view in views.values()] == [0, 0, 0]
    assert views["w2"].shape == (2, 3)
    assert views["w2_bias"].data_ptr() - start == 768 + 256
    assert made.size(2) == 768 + 256 + 256
    sources = made.sources(range(3, 5))
    assert sources["w13"].data_ptr() == made.weights["w13"][3].data_ptr()


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^layer 5: w2 is on cpu with strides \(1, 3\), wanted"):
        LayerGroups(5, {"w13": torch.zeros(2, 3), "w2": torch.zeros(2, 3).T})
    with pytest.raises(ValueError, match=r"^layer 5: w2 has 3 experts, wanted 2$"):
        LayerGroups(5, {"w13": torch.zeros(2, 3), "w2": torch.zeros(3)})
