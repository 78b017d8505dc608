"""`lvllm tune` with servers whose speed is made up, and the file that it writes."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from lvllm.bench.measure import Grid
from lvllm.bench.speed import result_of
from lvllm.cli import tune
from lvllm.cli.app import app
from lvllm.errors import LvllmError
from lvllm.serving.given import read
from lvllm.serving.launch import Launch
from tests.bench.test_speed import together
from tests.planning.made_up import machine

TINY = Path(__file__).parents[2] / "examples/models/tiny-moe"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
    """Run the command; `speed` has the rate of a server by its environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))

    def invoke(speed: Callable[[dict[str, str]], float], *arguments: str) -> Result:
        def measured(launch: Launch, load: Any, grid: Grid, *rest: Any) -> list[Any]:
            assert grid == Grid((1024,), (1,), 128, 2)
            rate = speed(launch.environment)
            return [result_of(together(1, 20, 1 / rate, 1e-6, 0), 20, 1)]

        class NoLoad:
            __init__ = __exit__ = lambda *_: None
            __enter__ = lambda self: self  # noqa: E731

        monkeypatch.setattr(tune, "measured", measured)
        monkeypatch.setattr(tune, "LoadGenerator", NoLoad)
        monkeypatch.setattr(tune, "this_machine", machine)
        return CliRunner().invoke(app, ["tune", str(TINY), *arguments])

    return invoke


def binding(environment: dict[str, str]) -> float:
    return 20.0 if environment.get("LK_THREAD_BINDING") == "NUMA_NODE" else 10.0


def test_the_winner_is_written(run: Callable[..., Result], tmp_path: Path) -> None:
    result = run(binding, "--max-model-len", "512", "--seed", "3")
    assert result.exit_code == 0, result.output
    assert "had 2.00 and 2.00 times the plan's rate" in result.output
    text = (tmp_path / "tuned.yaml").read_text()
    assert text.startswith("# LVLLM_MOE_NUMA_ENABLED=1 vllm serve --config tuned.yaml\n")
    file = yaml.safe_load(text)
    assert file["model"] == str(TINY)
    assert (file["max-model-len"], file["seed"]) == (512, 3)
    assert file["additional_config.lvllm.lk_thread_binding"] == "NUMA_NODE"
    # The file says the same again: nothing of it is chosen by a plan any more.
    given = read(["--config", "tuned.yaml"], {})
    assert given.settings["lk_thread_binding"].value == "NUMA_NODE"
    assert given.model == str(TINY)
    # The measuring itself leaves nothing in it.
    assert not {name for name in file if "prefix" in name}
    again = run(binding)
    assert str(again.exception) == "lvllm: --output tuned.yaml: the file exists"


def test_the_plan_stays_if_nothing_is_faster(run: Callable[..., Result], tmp_path: Path) -> None:
    result = run(lambda environment: 10.0, "-o", "same.yaml")
    assert result.exit_code == 0, result.output
    assert "Nothing was faster" in result.output
    assert "lk_" not in (tmp_path / "same.yaml").read_text()


def test_environment_and_yaml_of_the_user_are_kept(
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LK_ACTIVATION_BITS", "16")
    monkeypatch.setenv("LK_POWER_SAVING", "1")
    (tmp_path / "own.yaml").write_text(
        "compilation-config: {mode: NONE}\nspeculative_config.num_speculative_tokens: 1\n"
        "additional_config: {lvllm: {watchdog_seconds: 77, moe_use_weight: [{'a: b': KEEP}]}}\n"
    )
    result = run(binding, "--config", "own.yaml")
    assert result.exit_code == 0, result.output
    text = (tmp_path / "tuned.yaml").read_text()
    assert text.startswith("# LVLLM_MOE_NUMA_ENABLED=1 LK_ACTIVATION_BITS=16 vllm serve")
    file = yaml.safe_load(text)
    assert file["additional_config.lvllm.lk_power_saving"] == 1
    assert file["additional_config.lvllm.watchdog_seconds"] == 77
    assert file["additional_config.lvllm.moe_use_weight"] == [{"a: b": "KEEP"}]
    assert file["speculative-config.num_speculative_tokens"] == 1
    assert yaml.safe_load(file["compilation-config"]) == {"mode": "NONE"}
    assert "config" not in file


def test_failing_servers_are_named(run: Callable[..., Result]) -> None:
    def failing(environment: dict[str, str]) -> float:
        if "LK_THREADS" in environment:
            raise LvllmError("too many threads")
        return random.uniform(9.99, 10)

    result = run(failing)
    assert result.exit_code == 0, result.output
    assert ": too many threads\n" in result.output


def test_refusals(run: Callable[..., Result], tmp_path: Path) -> None:
    for arguments, said in (
        (["--api-key", "k"], "--api-key: leave it out"),
        (["-o", "nowhere/a.yaml"], "--output nowhere/a.yaml: there is no folder nowhere"),
        (["--max-model-len", "100000000"], "there is no plan to begin with: "),
    ):
        result = run(binding, *arguments)
        assert str(result.exception).startswith(f"lvllm: {said}"), result.exception
