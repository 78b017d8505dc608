"""Fixtures shared by all tests."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import hypothesis
import pytest
import torch

from tests import seeds
from tests.e2e import results
from tests.models.make import make

# No test uses a network, and none inherits a setting from the shell.
os.environ["HF_HUB_OFFLINE"] = "1"
for name in list(os.environ):
    if name.startswith(("LVLLM_", "LK_")):
        del os.environ[name]
if "PYTEST_XDIST_WORKER" in os.environ:
    # As many tests run side by side as there are cores. PyTorch's threads spin while they wait for
    # each other: with two for each test on two cores, answers of a small model that take 1 s took
    # 70 s. The variable is for the processes that tests start.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

# By default an example that takes more than 200 ms fails, but no test here asserts a time.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

RECORD = "record"


def pytest_addoption(parser: pytest.Parser) -> None:
    seeds.add_option(parser)
    parser.addoption(
        "--record",
        type=Path,
        metavar="FILE",
        help="put what tests of whole models find into FILE; docs/models.md is made of"
        " docs/tested.json",
    )


class Recorder:
    """Writes what the tests that passed have recorded into `file`."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.found: results.Found = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" or not report.passed:
            return
        for name, value in report.user_properties:
            if name == RECORD:
                table, row, values = cast(tuple[str, str, dict[str, Any]], value)
                self.found.setdefault(table, {})[row] = values

    def pytest_sessionfinish(self) -> None:
        results.write(self.found, self.file)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    seeds.register(config)
    file = config.getoption("--record")
    # pytest-xdist sends the reports of all its workers to one process, which alone writes.
    if file is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(file))


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """A test calls record(table, row, **values) after its comparison has passed."""

    def add(table: str, row: str, **values: Any) -> None:
        request.node.user_properties.append((RECORD, (table, row, values)))

    return add


@pytest.fixture(scope="session")
def qwen3_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-MoE checkpoint of 3 layers; layer 1 is dense."""
    return make("qwen3_moe", tmp_path_factory.mktemp("models") / "qwen3_moe")


@pytest.fixture(scope="module")
def vllm_config(qwen3_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """vLLM's configuration for a bfloat16 model, in a process of one rank that has the plugin."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        init_distributed_environment,
        initialize_model_parallel,
    )
    from vllm.engine.arg_utils import EngineArgs

    from lvllm import engine, plugin

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LVLLM_MOE_NUMA_ENABLED", "1")
        # Preparing a configuration sets this variable for the workers; `patch` restores it.
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "auto")
        plugin.register()
        arguments = {"model": str(qwen3_moe), "skip_tokenizer_init": True, "enforce_eager": True}
        config = EngineArgs(**arguments, max_model_len=128).create_engine_config()
        meeting = tmp_path_factory.mktemp("distributed") / "store"
        with set_current_vllm_config(config):
            init_distributed_environment(1, 0, f"file://{meeting}", 0, "gloo")
            initialize_model_parallel(1)
        yield config
        cleanup_dist_env_and_memory()
        engine.configure()
