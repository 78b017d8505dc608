"""What a worker says of the numbers that it counts."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lvllm import engine
from lvllm.engine import counters
from lvllm.engine.counters import SIZES
from lvllm.metrics import memory
from lvllm.metrics.collector import families
from lvllm.worker import counting
from lvllm.worker.counting import Steps, node_bytes
from tests.random_layers import FORMATS, Random, random_layer


@pytest.fixture(autouse=True)
def default_engine() -> Iterator[None]:
    yield
    engine.configure()


@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_an_experts_bytes_are_divided_among_nodes(format: str, interleave: bool) -> None:
    """Node 0 has three of four threads, and whole tiles of 64 rows: three of four, and two of three
    where there are 192 rows."""
    engine.configure(topology="2 nodes x 3,1 cores x 1 threads")
    layer = random_layer(Random(3), format, 4, 256, 192).make()
    shares = node_bytes(layer, engine.info(), interleave)
    whole = sum(tensor.nbytes for tensor in layer.tensors.values()) / 4
    assert sum(shares.values()) == pytest.approx(whole)
    by_name = {name: tensor.nbytes / 4 for name, tensor in layer.tensors.items()}
    w2 = sum(size for name, size in by_name.items() if name.startswith("w2"))
    if interleave:
        assert shares[0] == shares[1] == pytest.approx(whole / 2)
    else:
        assert shares[0] == pytest.approx((whole - w2) * 2 / 3 + w2 * 3 / 4)


def test_steps() -> None:
    numbers = [0, 0]
    steps = Steps(numbers)
    for tokens in (3, 0, 4):
        steps.add(SimpleNamespace(total_num_scheduled_tokens=tokens))
    assert numbers == [2, 7]
    Steps(None).add(None)


class Experts(torch.nn.Module):
    """Takes the place of vLLM's module."""

    def __init__(self, number: int, layer: Any, expert_map: Any = None) -> None:
        super().__init__()
        self.layer_name = f"model.layers.{number}.mlp.experts"
        if layer is not None:
            self.engine = layer
        self.expert_map = expert_map


def test_layers_of_all_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """One in the engine with experts 2 and 0 of four, a resident one, and one of a draft."""
    monkeypatch.setenv(memory._VARIABLE, "")
    monkeypatch.setattr(counting, "RoutedExperts", Experts)
    config = SimpleNamespace(numa_interleave=False, metrics_experts=True)
    monkeypatch.setattr(counting.HybridConfig, "carried", lambda _: config)
    memory.prepare()
    random = Random(5)
    main, draft = (random_layer(random, "bf16", experts, 64, 96).make() for experts in (2, 3))
    model = torch.nn.Sequential(
        Experts(4, main, torch.tensor([1, -1, 0, -1])), torch.nn.Linear(2, 2), Experts(7, None)
    )
    vllm_config = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(is_kv_producer=True), parallel_config=None
    )
    drafts = Experts(0, draft)
    runner = SimpleNamespace(get_model=lambda: model, get_draft_model=lambda: drafts)
    worker = SimpleNamespace(vllm_config=vllm_config, rank=3, model_runner=runner)
    steps = counting.count_worker(worker)
    ids = torch.tensor([[0, 1], [0, -1], [0, 1]], dtype=torch.int32)
    x, weights = random.normal(3, 64).bfloat16(), torch.ones(3, 2)
    main(x, ids, weights)
    draft(x[:1], torch.tensor([[2, 1]], dtype=torch.int32), weights[:1])
    steps.add(SimpleNamespace(total_num_scheduled_tokens=11))
    found = {
        (sample.name, *sorted(set(sample.labels.items()) - {("engine", "prefill"), ("rank", "3")})):
        sample.value
        for family in families(memory.Reader().read())
        for sample in family.samples
    }  # fmt: skip
    memory.close()
    where = {"offloaded": ("cpu", "no_gpu"), "draft": ("cpu", "no_gpu")}
    where["resident"] = ("resident", "resident")
    for kind, layers, tokens in (("offloaded", 1, 3), ("draft", 1, 1), ("resident", 1, 11)):
        path, reason = where[kind]
        labels = (("class", kind), ("path", path), ("reason", reason))
        assert found["lvllm_expert_layers", ("class", kind)] == layers
        assert found["lvllm_expert_calls_total", *labels] == 1
        assert found["lvllm_expert_tokens_total", *labels] == tokens
    routed = {
        tuple(value for _, value in key[1:]): count
        for key, count in found.items()
        if key[0] == "lvllm_routed_tokens_total"
    }
    assert routed == {
        **{("offloaded", "2", "4"): 3, ("offloaded", "0", "4"): 2},
        **{("draft", "0", "0"): 0, ("draft", "1", "0"): 1, ("draft", "2", "0"): 1},
    }
    below = [
        found["lvllm_batch_experts_bucket", ("class", "offloaded"), ("le", le), ("path", "cpu")]
        for le in ("1.0", "2.0", "+Inf")
    ]
    assert below == [0, 1, 1]
    assert len(SIZES) == sum(
        key[0] == "lvllm_batch_experts_bucket" and ("class", "draft") in key for key in found
    )
    for layer in (main, draft):
        counters.count(layer.handle, None)
