"""Fixtures of the engine's tests."""

from collections.abc import Iterator

import pytest

from lvllm import engine


@pytest.fixture
def default_settings() -> Iterator[None]:
    """Give the engine its default settings again after the test."""
    yield
    engine.configure()
