"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest

from tests.models.make import make

# No test reaches for a network, and none inherits a setting of the shell it was started from.
os.environ["HF_HUB_OFFLINE"] = "1"
for name in list(os.environ):
    if name.startswith(("LVLLM_", "LK_")):
        del os.environ[name]


@pytest.fixture(scope="session")
def qwen3_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-MoE checkpoint of 3 layers; layer 1 is dense."""
    return make("qwen3_moe", tmp_path_factory.mktemp("models") / "qwen3_moe")
