"""Brings the counts of all processes into `/metrics`, when somebody asks for it."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import prometheus_client
from prometheus_client.metrics_core import Metric as Family

from lvllm.log import logger
from lvllm.metrics.catalogue import METRICS
from lvllm.metrics.memory import Block, Numbers, Reader

__all__ = ["collect", "families", "register"]

_Labels = tuple[tuple[str, str], ...]


class _Collector:
    """prometheus_client asks it for all values at each scrape."""

    def __init__(self) -> None:
        self._reader = Reader()
        self._failed = False

    def describe(self) -> Iterable[Family]:
        # Without this function, prometheus_client would read the values to learn the names.
        return []

    def collect(self) -> Iterable[Family]:
        try:
            return families(self._reader.read())
        except (OSError, ValueError) as error:
            if not self._failed:
                logger.warning("LvLLM: its metrics cannot be read: %s", error)
            self._failed = True
            return []


_collector = _Collector()
_registered = False


def register() -> None:
    """Let the registry of this process have LvLLM's metrics."""
    global _registered
    if not _registered:
        prometheus_client.REGISTRY.register(_collector)
        _registered = True


def collect() -> Iterable[Family]:
    """All metrics of now, for a registry that is made anew at each scrape."""
    return _collector.collect()


def families(blocks: Iterable[tuple[Block, Numbers]]) -> list[Family]:
    """The metrics in these blocks. Values with the same name and labels are added up."""
    values: dict[str, dict[_Labels, float]] = {}
    for block, numbers in blocks:
        for sample, labels, value in _samples(block, numbers):
            of_name = values.setdefault(sample, {})
            key = tuple(labels.items())
            of_name[key] = of_name.get(key, 0.0) + value
    found = []
    for metric in METRICS:
        family = Family(metric.name.removesuffix("_total"), metric.meaning, metric.kind)
        for sample in metric.samples:
            for key, value in values.get(sample, {}).items():
                family.add_sample(sample, dict(key), value)
        if family.samples:
            found.append(family)
    return found


def _samples(block: Block, numbers: Numbers) -> Iterable[tuple[str, dict[str, str], float]]:
    for series in block.series:
        labels: dict[str, Any] = {**block.labels, **series.labels}
        scaled = numbers[np.asarray(series.slots, np.int64)] * np.asarray(series.scale)
        if series.each is None:
            yield series.sample, labels, float(scaled.sum())
        else:
            name, texts = series.each
            for text, value in zip(texts, scaled, strict=True):
                yield series.sample, {**labels, name: text}, float(value)
