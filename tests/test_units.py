"""Numbers as people read them."""

from lvllm.units import ranges


def test_ranges() -> None:
    assert ranges([]) == ""
    assert ranges([3]) == "3"
    assert ranges([1, 2, 3, 7, 9, 10]) == "1-3,7,9-10"
