"""Fixtures shared by all tests."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import record as records
from tests.models.make import make

# No test reaches for a network, and none inherits a setting of the shell it was started from.
os.environ["HF_HUB_OFFLINE"] = "1"
for name in list(os.environ):
    if name.startswith(("LVLLM_", "LK_")):
        del os.environ[name]

FOUND = pytest.StashKey[records.Found]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record",
        type=Path,
        metavar="FILE",
        help="put what tests of whole models find into FILE; README's tables are made of"
        " docs/tested.json",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FOUND] = {}


def pytest_sessionfinish(session: pytest.Session) -> None:
    file = session.config.getoption("--record")
    if file is not None:
        records.write(session.config.stash[FOUND], file)


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """record(table, row, **values) after a comparison has passed."""

    def add(table: str, row: str, **values: Any) -> None:
        request.config.stash[FOUND].setdefault(table, {})[row] = values

    return add


@pytest.fixture(scope="session")
def qwen3_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-MoE checkpoint of 3 layers; layer 1 is dense."""
    return make("qwen3_moe", tmp_path_factory.mktemp("models") / "qwen3_moe")
