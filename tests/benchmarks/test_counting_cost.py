"""The benchmark of what counting costs runs; the time itself is not asserted."""

from benchmarks.cases import Shape
from benchmarks.counting_cost import counting_cost


def test_it_times_both_ways() -> None:
    found = counting_cost(Shape(64, 32, 4, 2), "bf16", 1, 2)
    assert found["calls_per_round"] > 1
    assert min(found["without_us"], found["with_us"]) > 0
    assert found["median_with_us"] >= found["with_us"]
