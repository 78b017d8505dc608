"""How counts become metrics, and that the documentation names them all."""

import random
import re
from pathlib import Path

import numpy as np
import prometheus_client
import pytest
from prometheus_client import CollectorRegistry, generate_latest, multiprocess

from lvllm.metrics import collector, memory
from lvllm.metrics.catalogue import METRICS
from lvllm.metrics.memory import Block, Series
from lvllm.top.scrape import parse

ROOT = Path(__file__).parents[2]


class Static:
    """A collector of some blocks."""

    def __init__(self, *blocks: tuple[Block, memory.Numbers]) -> None:
        self.blocks = blocks

    def collect(self) -> list[prometheus_client.Metric]:
        return collector.families(self.blocks)


def block(
    labels: dict[str, str], series: list[Series], *numbers: int
) -> tuple[Block, memory.Numbers]:
    return Block(labels, series, 0, len(numbers)), np.array(numbers, np.int64)


def exported(*blocks: tuple[Block, memory.Numbers]) -> str:
    registry = CollectorRegistry()
    registry.register(Static(*blocks))  # type: ignore[arg-type]
    return generate_latest(registry).decode()


def test_values_are_added_scaled_and_spread() -> None:
    draw = [random.randrange(1 << 40) for _ in range(4)]
    series = [
        Series("lvllm_expert_seconds_total", {"activity": "computing"}, [0, 2], 1e-9),
        Series("lvllm_expert_read_bytes_total", {"node": "1"}, [1, 3], [2.0, 0.5]),
        Series("lvllm_routed_tokens_total", {"layer": "4"}, [3, 0], each=("expert", ["7", "9"])),
        Series("lvllm_bank_bytes", {"class": "draft"}, [2]),
    ]
    found = parse(exported(block({"rank": "3"}, series, *draw)), 0.0)
    assert found.samples["lvllm_expert_seconds_total"] == [
        ({"rank": "3", "activity": "computing"}, pytest.approx((draw[0] + draw[2]) / 1e9))
    ]
    assert found.sum("lvllm_expert_read_bytes_total", node="1") == 2 * draw[1] + draw[3] / 2
    routed = found.by("expert", name="lvllm_routed_tokens_total", layer="4")
    assert routed == {("7",): draw[3], ("9",): draw[0]}
    assert found.sum("lvllm_bank_bytes", rank="3") == draw[2]


def test_blocks_with_the_same_labels_are_added_up() -> None:
    series = [Series("lvllm_nan_stops_total", {}, [0])]
    text = exported(
        block({"engine": "0"}, series, 2),
        block({"engine": "1"}, series, 4),
        block({"engine": "0"}, series, 3),
    )
    assert parse(text, 0.0).by("engine", name="lvllm_nan_stops_total") == {("0",): 5, ("1",): 4}


def test_kinds_are_those_of_the_catalogue() -> None:
    labels = {"engine": "0"}
    blocks = [
        block(labels, [Series(sample, {"le": "+Inf"}, [0]) for sample in metric.samples], 1)
        for metric in METRICS
    ]
    text = exported(*blocks)
    for metric in METRICS:
        assert f"# TYPE {metric.name} {metric.kind}\n" in text
        assert f"# HELP {metric.name} {metric.meaning}\n" in text
    assert text.count("# TYPE ") == len(METRICS)


def test_names_follow_the_conventions() -> None:
    for metric in METRICS:
        assert re.fullmatch(r"lvllm_[a-z_]+", metric.name)
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert not set(metric.labels) & {"le", "instance", "job"}


def test_the_documentation_has_each_metric_with_its_labels() -> None:
    rows = re.findall(
        r"^\| `(lvllm_\w+)` \| (\w+) \| (.*?) \|", (ROOT / "docs/metrics.md").read_text(), re.M
    )
    documented = {
        name: (kind, tuple(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows
    }
    assert documented == {metric.name: (metric.kind, metric.labels) for metric in METRICS}


def test_an_end_of_the_front_process_breaks_no_scrape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(memory._VARIABLE, "1:999999")
    warnings: list[str] = []
    monkeypatch.setattr(
        collector.logger, "warning", lambda text, *more: warnings.append(text % more)
    )
    own = collector._Collector()
    assert list(own.collect()) == list(own.collect()) == []
    assert len(warnings) == 1


def test_several_api_servers_have_them_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lvllm.patches.metrics import collect_from_workers

    monkeypatch.setattr(
        multiprocess.MultiProcessCollector, "collect", multiprocess.MultiProcessCollector.collect
    )
    collect_from_workers.install()
    series = [Series("lvllm_nan_stops_total", {}, [0])]
    monkeypatch.setattr(collector, "_collector", Static(block({"engine": "0"}, series, 11)))
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry, path=str(tmp_path))
    found = parse(generate_latest(registry).decode(), 0.0)
    assert found.sum("lvllm_nan_stops_total") == 11
