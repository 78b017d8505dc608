"""LvLLM's metrics where several API servers answer `/metrics` together."""

from collections.abc import Iterable
from typing import Any

from lvllm.patches.registry import patch

__all__ = ["collect_from_workers"]


@patch(
    "prometheus_client.multiprocess:MultiProcessCollector.collect",
    signature="(self)",
    why="With several API servers, each scrape makes a registry that holds nothing but the"
    " files of prometheus_client's processes. It gets the counts of LvLLM's workers as well.",
    upstream="none, because nothing was proposed yet: vLLM has no place where a plugin can add"
    " a collector to that registry",
    until="vLLM lets plugins add collectors to the registry of `/metrics`",
    checked=("0.26.0",),
)
def collect_from_workers(original: Any) -> Any:
    from lvllm.metrics import collector

    def collect(self: Any) -> Iterable[Any]:
        yield from original(self)
        yield from collector.collect()

    return collect
