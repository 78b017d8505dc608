"""Which numbers of processes divide a model, and what is said of the others."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvllm.settings.division import check_heads, check_rows
from lvllm.settings.variables import SettingError


def model(heads: int, kv_heads: int, **fields: Any) -> Any:
    return SimpleNamespace(
        model="some/model",
        model_arch_config=SimpleNamespace(total_num_attention_heads=heads),
        get_total_num_kv_heads=lambda: kv_heads,
        hf_text_config=SimpleNamespace(**fields),
    )


def parallel(tensor: int, data: int = 1, experts: bool = False) -> Any:
    return SimpleNamespace(
        tensor_parallel_size=tensor, data_parallel_size=data, enable_expert_parallel=experts
    )


def refusal(of: Any, division: Any) -> str | None:
    try:
        check_heads(of, division)
        check_rows(of, division)
    except SettingError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("of", "division", "message"),
    [
        (
            model(8, 4, moe_intermediate_size=96),
            parallel(3, experts=True),
            "tensor-parallel-size=3 is not allowed for some/model: it does not divide its 8"
            " attention heads and 4 KV heads; allowed is 1, 2, 4, 8, or data-parallel-size=3 with"
            " enable-expert-parallel=True",
        ),
        (
            model(6, 2, moe_intermediate_size=96),
            parallel(3),
            "tensor-parallel-size=3 is not allowed for some/model: it does not divide its 6"
            " attention heads and 2 KV heads; allowed is 1, 2, 6, or data-parallel-size=3 with"
            " enable-expert-parallel=True",
        ),
        (
            model(6, 3, moe_intermediate_size=128, intermediate_size=96),
            parallel(3),
            "tensor-parallel-size=3 is not allowed for some/model: 3 processes do not divide the"
            " 128 rows of each expert; allowed is enable-expert-parallel=True, which divides whole"
            " experts, or tensor-parallel-size 1",
        ),
        (
            model(8, 4, intermediate_size=128),
            parallel(2, data=3),
            "data-parallel-size=3 with tensor-parallel-size=2 is not allowed for some/model: 6"
            " processes do not divide the 128 rows of each expert; allowed is"
            " enable-expert-parallel=True, which divides whole experts",
        ),
    ],
)
def test_one_line_says_what_is_allowed(of: Any, division: Any, message: str) -> None:
    assert refusal(of, division) == message


@pytest.mark.parametrize(
    ("of", "division"),
    [
        (model(6, 3, moe_intermediate_size=96), parallel(3)),
        (model(6, 1, moe_intermediate_size=96), parallel(3)),  # each process has a copy of the head
        (model(6, 3, moe_intermediate_size=128), parallel(3, experts=True)),
        (model(8, 4, moe_intermediate_size=128), parallel(1, data=3, experts=True)),
        (model(8, 4, moe_intermediate_size=[128, 96]), parallel(4)),  # different in each layer
        (model(8, 4), parallel(8)),
    ],
)
def test_what_divides(of: Any, division: Any) -> None:
    assert refusal(of, division) is None


@given(
    kv_heads=st.integers(1, 12),
    group=st.integers(1, 8),
    rows=st.integers(1, 40).map(lambda tiles: 16 * tiles),
    size=st.integers(1, 16),
    experts=st.booleans(),
)
def test_the_sizes_named_are_those_accepted(
    kv_heads: int, group: int, rows: int, size: int, experts: bool
) -> None:
    of = model(kv_heads * group, kv_heads, moe_intermediate_size=rows)
    said = refusal(of, parallel(size, experts=experts))
    if said is None:
        return
    named = re.search(r"(?:; allowed is|tensor-parallel-size) ([\d, ]+?)(?:, or|$)", said)
    assert named
    accepted = [
        other
        for other in range(1, kv_heads * group + 1)
        if refusal(of, parallel(other, experts=experts)) is None
    ]
    assert [int(number) for number in named[1].split(", ")] == accepted
