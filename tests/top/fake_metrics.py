"""A server of `/metrics` that counts as a test tells it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from lvllm.metrics.collector import families
from lvllm.metrics.memory import Block, Series

RANK = {"engine": "0", "rank": "0"}
GPU = {"class": "offloaded", "path": "streamed"}
CPU = {"class": "offloaded", "path": "cpu"}


class FakeMetrics(ThreadingHTTPServer):
    """Has vLLM's own metrics, and LvLLM's of a server with experts on both paths."""

    daemon_threads = True

    def __init__(self, experts: int = 0, layers: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.registry = CollectorRegistry()
        engine = {"engine": "0"}
        self.answers = Counter("vllm:generation_tokens", "", engine, registry=self.registry)
        self.prompts = Counter("vllm:prompt_tokens", "", engine, registry=self.registry)
        for name, value in (("num_requests_running", 3), ("num_requests_waiting", 1)):
            Gauge(f"vllm:{name}", "", engine, registry=self.registry).labels("0").set(value)
        Gauge("vllm:kv_cache_usage_perc", "", engine, registry=self.registry).labels("0").set(0.25)
        self.names: list[str] = []
        self.series: list[Series] = []
        self.numbers = np.zeros(40 + experts * layers, np.int64)
        for name, labels, scale in (
            ("lvllm_expert_calls_total", CPU | {"reason": "small"}, 1),
            ("lvllm_expert_tokens_total", CPU | {"reason": "small"}, 1),
            ("lvllm_expert_seconds_total", CPU | {"activity": "computing"}, 1e-3),
            ("lvllm_expert_seconds_total", CPU | {"activity": "waiting"}, 1e-3),
            ("lvllm_batch_experts_sum", CPU, 1),
            ("lvllm_batch_experts_count", CPU, 1),
            ("lvllm_expert_read_bytes_total", {"class": "offloaded", "node": "0"}, 1e6),
            ("lvllm_expert_read_bytes_total", {"class": "offloaded", "node": "1"}, 1e6),
            ("lvllm_expert_calls_total", GPU | {"reason": "large"}, 1),
            ("lvllm_expert_tokens_total", GPU | {"reason": "large"}, 1),
            ("lvllm_expert_seconds_total", GPU | {"activity": "computing"}, 1e-3),
            ("lvllm_expert_seconds_total", GPU | {"activity": "copying"}, 1e-3),
            ("lvllm_expert_seconds_total", GPU | {"activity": "waiting"}, 1e-3),
            ("lvllm_copied_bytes_total", {"class": "offloaded", "what": "weights"}, 1e6),
            ("lvllm_staged_groups_total", {"class": "offloaded", "result": "hit"}, 1),
            ("lvllm_staged_groups_total", {"class": "offloaded", "result": "stall"}, 1),
            ("lvllm_prefill_queue", {"stage": "queued"}, 1),
            ("lvllm_nan_stops_total", {}, 1),
            ("lvllm_bank_bytes", {"class": "offloaded"}, 1e9),
            ("lvllm_staging_bytes", {"memory": "ring"}, 1e9),
        ):
            self.series.append(Series(name, labels, [len(self.series)], scale))
        for layer in range(layers):
            first = 40 + layer * experts
            names = [str(expert) for expert in range(experts)]
            self.series.append(
                Series(
                    "lvllm_routed_tokens_total",
                    {"class": "offloaded", "layer": str(layer)},
                    [*range(first, first + experts)],
                    each=("expert", names),
                )
            )
        self.registry.register(self)  # type: ignore[arg-type]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def text(self) -> str:
        return generate_latest(self.registry).decode()

    def collect(self) -> Any:
        return families([(Block(RANK, self.series, 0, len(self.numbers)), self.numbers)])

    def describe(self) -> Any:
        return []

    def count(self, **numbers: int) -> None:
        """Set numbers by the place of their series: n0=5, n1=..."""
        for name, value in numbers.items():
            self.numbers[int(name[1:])] = value


class _Handler(BaseHTTPRequestHandler):
    server: FakeMetrics

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        body = self.server.text.encode() if self.path == "/metrics" else b""
        self.send_response(200 if body else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def serving(**sizes: int) -> Iterator[FakeMetrics]:
    with FakeMetrics(**sizes) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
