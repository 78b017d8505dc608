"""One number from which all tests draw their data: `pytest --seed N` draws the same again.

Without the option each run draws a new number, and pytest's first lines show it. Each test starts
from that number and its own name, so that it draws the same alone as in a run of all tests.
"""

import os
import random
import sys
import zlib

import pytest

__all__ = ["add_option", "register"]


class Seeds:
    """Seeds `random`, PyTorch and hypothesis before each module and each test."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def pytest_report_header(self) -> str:
        return f"seed: {self.seed} (the same data again: --seed {self.seed})"

    def pytest_collectstart(self, collector: pytest.Collector) -> None:
        self._start(collector.nodeid)  # Importing a module of tests may draw, too.

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self._start(item.nodeid)

    def _start(self, name: str) -> None:
        seed = zlib.crc32(f"{self.seed}:{name}".encode())
        random.seed(seed)
        if torch := sys.modules.get("torch"):
            torch.manual_seed(seed)


def add_option(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, metavar="N", help="draw the data of an earlier run again")


def register(config: pytest.Config) -> None:
    """Give `config` its seed; pytest-xdist carries it to the processes of its workers."""
    if config.option.seed is None:
        config.option.seed = int.from_bytes(os.urandom(4))
    else:
        # Only then, because hypothesis does not try its earlier failures again with a seed.
        config.option.hypothesis_seed = str(config.option.seed)
    config.pluginmanager.register(Seeds(config.option.seed))
