"""Fixtures shared by all tests."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import hypothesis
import pytest

from tests.e2e import record as records
from tests.models.make import make

# No test reaches for a network, and none inherits a setting of the shell it was started from.
os.environ["HF_HUB_OFFLINE"] = "1"
for name in list(os.environ):
    if name.startswith(("LVLLM_", "LK_")):
        del os.environ[name]

# No test asserts a time: by default an example of more than 200 ms fails.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

RECORD = "record"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record",
        type=Path,
        metavar="FILE",
        help="put what tests of whole models find into FILE; docs/models.md is made of"
        " docs/tested.json",
    )


class Recorder:
    """Puts what passed tests recorded into `file`."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.found: records.Found = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" or not report.passed:
            return
        for name, value in report.user_properties:
            if name == RECORD:
                table, row, values = cast(tuple[str, str, dict[str, Any]], value)
                self.found.setdefault(table, {})[row] = values

    def pytest_sessionfinish(self) -> None:
        records.write(self.found, self.file)


def pytest_configure(config: pytest.Config) -> None:
    file = config.getoption("--record")
    # Of several processes one writes: pytest-xdist sends it the reports of all.
    if file is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(file))


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """record(table, row, **values) after a comparison has passed."""

    def add(table: str, row: str, **values: Any) -> None:
        request.node.user_properties.append((RECORD, (table, row, values)))

    return add


@pytest.fixture(scope="session")
def qwen3_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-MoE checkpoint of 3 layers; layer 1 is dense."""
    return make("qwen3_moe", tmp_path_factory.mktemp("models") / "qwen3_moe")
