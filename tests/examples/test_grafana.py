"""The dashboard: its structure, and that each number it asks for exists."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lvllm.metrics.catalogue import METRICS

DASHBOARD = Path(__file__).parents[2] / "examples" / "grafana" / "lvllm.json"


def load() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return content


def panels() -> list[dict[str, Any]]:
    """All panels, those in folded rows too."""
    return [one for panel in load()["panels"] for one in (panel, *panel.get("panels", ()))]


def expressions() -> list[str]:
    """What panels and variables ask Prometheus."""
    targets = [target["expr"] for panel in panels() for target in panel.get("targets", ())]
    variables = load()["templating"]["list"]
    return targets + [one["query"]["query"] for one in variables if one["type"] == "query"]


def metric_names() -> set[str]:
    """The metrics of LvLLM and vLLM that the dashboard asks for."""
    return {name for text in expressions() for name in re.findall(r"\b(?:lvllm_|vllm:)\w+", text)}


def test_it_shows_every_metric_and_no_other() -> None:
    samples = {sample for metric in METRICS for sample in metric.samples}
    own = {name for name in metric_names() if name.startswith("lvllm")}
    assert own <= samples
    assert {metric.name for metric in METRICS if not own & {*metric.samples}} == set()


def test_it_asks_for_labels_that_the_metrics_have() -> None:
    labels = {sample: {*metric.labels} for metric in METRICS for sample in metric.samples}
    asked = 0
    for text in expressions():
        for name, selector in re.findall(r"(lvllm_\w+)\{(.*?)\}", text):
            used = set(re.findall(r"(\w+)=~?\"", selector))
            assert used <= labels[name] | {"instance"}, text
            asked += len(used)
        named = {name for name in labels if re.search(rf"\b{name}\b", text)}
        for group in re.findall(r"\bby \((.*?)\)", text):
            by = set(group.replace(" ", "").split(","))
            if named:
                assert by <= {"instance", "le"}.union(*(labels[name] for name in named)), text
            asked += len(by)
    assert asked > 50


def test_panels_are_complete_and_do_not_overlap() -> None:
    shown = [panel for panel in panels() if panel["type"] != "row"]
    numbers = [panel["id"] for panel in panels()]
    assert len(set(numbers)) == len(numbers)
    taken = set[tuple[int, int]]()
    for panel in shown:
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["targets"]
        assert all(target["legendFormat"] for target in panel["targets"])
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


def test_every_variable_exists() -> None:
    names = {one["name"] for one in load()["templating"]["list"]}
    texts = [*expressions(), *(panel["title"] for panel in panels())]
    used = {name for text in texts for name in re.findall(r"\$\{?(\w+)", text)}
    assert used - {"__rate_interval"} <= names
    assert names == {"datasource", "instance", "bandwidth", "layer"}


def test_it_is_of_grafanas_schema() -> None:
    """Grafana's own models take it, and drop or change nothing of it."""
    pytest.importorskip("grafana_foundation_sdk")
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    register_default_plugins()
    known = json.loads(JSONEncoder().encode(Dashboard.from_json(load())))
    assert _only_in(load(), known) == []


def _only_in(ours: Any, known: Any, path: str = "") -> list[str]:
    """The places of `ours` that are missing or other in `known`, which has defaults besides."""
    pairs: list[tuple[str, Any, Any]]
    if isinstance(ours, dict) and isinstance(known, dict):
        pairs = [(f"{path}/{name}", value, known.get(name, ...)) for name, value in ours.items()]
    elif isinstance(ours, list) and isinstance(known, list) and len(ours) == len(known):
        pairs = [(f"{path}/{at}", value, known[at]) for at, value in enumerate(ours)]
    else:
        return [] if ours == known else [path]
    return [place for name, own, other in pairs for place in _only_in(own, other, name)]
