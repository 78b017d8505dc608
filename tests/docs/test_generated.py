"""The generated pages and pictures are current."""

import pytest

from benchmarks.recipes.__main__ import pages
from docs import chinese_settings
from docs.pictures.__main__ import pictures


def test_pictures() -> None:
    for file, text in pictures():
        assert file.read_text() == text, f"{file.name}: python -m docs.pictures"


def test_chinese_settings() -> None:
    wanted = chinese_settings.current()
    assert chinese_settings.PAGE.read_text() == wanted, "python -m docs.chinese_settings"


@pytest.mark.slow
def test_recipes() -> None:
    for file, text in pages():
        assert file.read_text() == text, f"{file.name}: python -m benchmarks.recipes"
