"""The page with plans for published models."""

from pathlib import Path

from benchmarks.plans.__main__ import pages

PAGE = Path(__file__).parents[2] / "docs/plans.md"


def test_the_pages_are_current() -> None:
    for file, text in pages():
        assert file.read_text() == text, f"{file.name}: python -m benchmarks.plans"


def test_published_decoding_is_predicted_within_a_factor_of_two() -> None:
    rows = [line.split(" | ") for line in PAGE.read_text().splitlines() if " | decode | " in line]
    ratios = [float(row[5]) for row in rows]
    assert len(ratios) == 6
    assert all(0.5 < ratio < 2 for ratio in ratios)
