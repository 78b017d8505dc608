"""Tests the break-even batch size: the rule on made-up numbers, measuring on a made-up clock."""

import logging
import re
import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lvllm.gpu import break_even, shared, streamed
from lvllm.gpu.break_even import (
    MeasuredThreshold,
    Point,
    measure_threshold,
    search,
    threshold,
)
from lvllm.gpu.ring import StagingRing
from lvllm.gpu.shares import Rates, divide
from lvllm.gpu.stand_in import StandInAccelerator, StandInStream
from tests.random_layers import Random, random_layer

Costs = Callable[[int], Point]
times = st.floats(1e-5, 1, allow_nan=False)


def straight(cpu: float, each: float, copy: float, products: float) -> Costs:
    """Return linear costs. The longer of copy and products hides the shorter."""
    return lambda tokens: Point(tokens, cpu + each * tokens, max(copy, products * tokens))


def first_gain(costs: Costs, most: int) -> int:
    """Find the break-even by trying all batches; 0 if there is none."""
    return next((n for n in range(1, most + 1) if costs(n).gain >= 0), 0)


@given(times, times, times, st.floats(0, 0.9), st.integers(1, 3000))
def test_the_break_even_is_found(
    cpu: float, each: float, copy: float, share: float, most: int
) -> None:
    costs = straight(cpu / 100, each / 100, copy, each / 100 * share)
    points = search(costs, most)
    wanted, found = first_gain(costs, most), threshold(points, most)
    assert (found == 0) == (wanted == 0)
    assert abs(found - wanted) <= 1 + wanted // break_even.PRECISION
    assert len({point.tokens for point in points}) == len(points) <= 2 * most.bit_length() + 4
    largest = max(point.tokens for point in points)
    assert largest == most or largest <= max(2, 4 * wanted)  # Measuring is short.


@given(st.integers(200, 5000), st.integers(0, 6))
def test_one_lucky_batch_is_not_believed(wanted: int, doublings: int) -> None:
    def costs(tokens: int) -> Point:
        slow = tokens < wanted and tokens != 1 << doublings
        return Point(tokens, 1.0 if slow else 3.0, 2.0)

    found = threshold(search(costs, 10000), 10000)
    assert wanted * 7 // 8 - 1 <= found <= wanted * 8 // 7 + 1


@given(st.integers(2, 8), st.integers(10, 100000))
def test_where_time_runs_out_the_line_goes_on(measured: int, wanted: int) -> None:
    left = iter(range(measured))

    def costs(tokens: int) -> Point | None:
        if next(left, None) is None:
            return None
        return Point(tokens, 0.5 + tokens / 7, 0.5 + wanted / 7)

    found = threshold(search(costs, 50000), 50000)
    if wanted > 50000:
        assert found == 0
    else:
        assert abs(found - wanted) <= 1


@pytest.mark.parametrize(
    ("points", "most", "wanted"),
    [
        ([Point(1, 2, 1)], 9, 1),
        ([Point(1, 1, 1)], 1, 0),
        ([Point(1, 1, 2)], 9, 0),  # The break-even may be anywhere.
        ([Point(1, 1, 2), Point(2, 1, 3)], 9, 0),  # The break-even gets further away.
        ([Point(1, 1, 2), Point(2, 1, 2)], 9, 0),
        ([Point(1, 1, 3), Point(2, 2, 3)], 2, 0),
        ([Point(1, 1, 4), Point(2, 2, 4)], 9, 4),
        ([Point(1, 1, 4), Point(2, 2, 4)], 3, 0),
        ([Point(8, 9, 4), Point(4, 1, 4), Point(16, 20, 4)], 16, 6),  # Points may be in any order.
        ([Point(4, 5, 4), Point(8, 3, 4), Point(16, 7, 4)], 16, 10),  # The first gain was chance.
    ],
)
def test_rule(points: list[Point], most: int, wanted: int) -> None:
    assert threshold(points, most) == wanted


class Machine(StandInAccelerator):
    """A machine with a made-up clock, which advances by the work that one layer is given."""

    def __init__(self, speeds: Any, layer: Any) -> None:
        super().__init__()
        self.now, self._speeds = 0.0, speeds
        self.layer: Any = SimpleNamespace(
            accelerator=self,
            number=7,
            experts=layer,
            topk=3,
            routed=8,
            size=lambda: sum(tensor.nbytes for tensor in layer.tensors.values()),
            call=self.cpu,
        )
        self.batches: list[tuple[torch.Tensor, ...]] = []

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: StandInStream) -> None:
        super().copy(target, source, stream)
        storages = {t.untyped_storage().data_ptr() for t in self.layer.experts.tensors.values()}
        if source.untyped_storage().data_ptr() in storages:
            self.now += source.nbytes / self._speeds.bus

    def cpu(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        self.batches.append((x, ids, weights))
        self.now += len(x) * self._speeds.cpu

    def streamed(
        self,
        layer: Any,
        ring: StagingRing,
        number: int,
        x: torch.Tensor,
        ids: torch.Tensor,
        *_: Any,
    ) -> None:
        """The longer of copy and products hides the shorter."""
        start = self.now
        counts = ids[ids >= 0].bincount(minlength=layer.num_experts).tolist()
        for _some, _tensors in ring.stream(number, counts):
            pass
        self.now = max(self.now, start + len(x) * self._speeds.products)

    def shared(
        self, layer: Any, ring: StagingRing, number: int, call: Any, rates: Rates, *batch: Any
    ) -> None:
        """By the rates that were found. Where a share costs more than all, it never pays."""
        x, ids, _ = batch
        if self._speeds.waits:
            self.now += 1
            return
        counts = ids[ids >= 0].bincount(minlength=layer.num_experts).tolist()
        # The CPU's time is that of as many choices as the tokens have on average.
        expected = len(x) * 3 * 5 / 8
        self.now += divide(counts, rates)[1] * expected / max(1, sum(counts))


def make(monkeypatch: pytest.MonkeyPatch, **speeds: float) -> Machine:
    """Make a machine. `bus` is in bytes per second, `cpu` and `products` in seconds per token."""
    layer = random_layer(Random(5), "int4", 5, 64, 64).make()
    one = Machine(SimpleNamespace(**{"waits": True} | speeds), layer)
    monkeypatch.setattr(break_even, "time", SimpleNamespace(perf_counter=lambda: one.now))
    monkeypatch.setattr(streamed, "run", one.streamed)
    monkeypatch.setattr(shared, "run", one.shared)
    return one


def layers_of(one: Machine) -> dict[int, Any]:
    others = {n: {"w13": torch.zeros(1, 100 * n, dtype=torch.uint8)} for n in (6, 8, 9)}
    return {6: others[6], 7: one.layer.experts.tensors, 8: others[8], 9: others[9]}


def ring_of(one: Machine, ahead: int) -> StagingRing:
    return StagingRing(one, layers_of(one), ahead, 1 << 30)


def heard(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let caplog hear vLLM's loggers, which pass nothing on to the root logger."""
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level(logging.INFO, "vllm.plugins.lvllm")


@pytest.mark.parametrize("ahead", [2, 0])
def test_a_layer_is_measured(
    ahead: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A copy takes 2 ms, a token 20 us on the CPU and 10 us streamed."""
    one = make(monkeypatch, bus=0, cpu=20e-6, products=10e-6)
    one._speeds.bus = one.layer.size() / 2e-3
    ring = ring_of(one, ahead)
    heard(caplog, monkeypatch)
    found, rates = measure_threshold(
        MeasuredThreshold(torch.float16), ring, one.layer, layers=4, most=2000
    )
    assert abs(found - 100) <= 100 // 8
    assert rates is None
    (line,) = {record.getMessage() for record in caplog.records}  # Two handlers may get it.
    assert line.startswith(f"LvLLM: LVLLM_GPU_PREFILL_MIN_BATCH_SIZE=auto is {found}: bus ")
    assert " MB in 2.00 ms; " in line
    assert " (12500 tokens/s through 4 layers), " in line
    assert line.endswith(", 2.00 ms streamed")
    for x, ids, weights in one.batches:
        assert (x.dtype, weights.dtype, ids.dtype) == (torch.float16, torch.float32, torch.int32)
        assert ids.shape == weights.shape == (len(x), 3)
    # Each token has three experts of eight, of which three are other ranks'.
    ids = max((ids for _, ids, _ in one.batches), key=len)
    assert set(ids.unique().tolist()) == {-1, 0, 1, 2, 3, 4}
    assert all(
        len(set(row)) == len(row) for row in ([i for i in r if i >= 0] for r in ids.tolist())
    )
    # The ring works as a new one does.
    for number in (6, 7):
        layer = layers_of(one)[number]
        for some, tensors in ring.stream(number, [1] * len(layer["w13"])):
            one.synchronize(one.compute())
            for name, tensor in layer.items():
                wanted = tensor[some.start : some.stop].contiguous().view(torch.uint8)
                assert torch.equal(tensors[name].view(torch.uint8), wanted)
    one.close()


def test_a_cpu_that_is_always_faster(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one = make(monkeypatch, bus=1e6, cpu=1e-6, products=1e-7)
    heard(caplog, monkeypatch)
    auto = MeasuredThreshold(torch.bfloat16)
    assert measure_threshold(auto, ring_of(one, 1), one.layer, 4, most=100) == (0, None)
    assert re.search(r"=auto is 0 \(off\): .*; 100 tokens take it 0.10 ms", caplog.text)
    one.close()


@pytest.mark.parametrize(("least", "chosen"), [(1, 100), (300, 300), (5000, 0)])
def test_what_runs_from_graphs_is_not_streamed(
    least: int, chosen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = make(monkeypatch, bus=0, cpu=9e-5, products=1e-6)
    one._speeds.bus = one.layer.size() / 9e-3
    auto = MeasuredThreshold(torch.bfloat16, least=least)
    found, rates = measure_threshold(auto, ring_of(one, 1), one.layer, 4, most=4000)
    assert found == pytest.approx(chosen, rel=1 / break_even.PRECISION)
    assert rates is None
    one.close()


@pytest.mark.parametrize("copy", [0.3, 0.9, 1.7, 3.0])
def test_measuring_is_bounded(copy: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token takes 0.1 ms on the CPU, so the break-even follows from the copy's seconds."""
    one = make(monkeypatch, bus=0, cpu=1e-4, products=1e-5)
    one._speeds.bus = one.layer.size() / copy
    warm_up = 2 * copy + 3 * break_even.WARM_UP * (1e-4 + 1e-5)
    found, rates = measure_threshold(
        MeasuredThreshold(torch.bfloat16), ring_of(one, 1), one.layer, 4, most=1 << 15
    )
    assert one.now <= warm_up + 2 * break_even.SECONDS
    assert len(one.batches) > 6
    assert found == pytest.approx(copy / 1e-4, rel=0.01)  # All costs are linear here.
    assert rates is None
    one.close()


def test_batches_are_shared_where_that_is_faster(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A copy takes 2 ms, and a token 20 us on the CPU: 100 tokens take each of them as long."""
    one = make(monkeypatch, bus=0, cpu=20e-6, products=1e-7, waits=False)
    one._speeds.bus = one.layer.size() / 2e-3
    heard(caplog, monkeypatch)
    auto = MeasuredThreshold(torch.bfloat16)
    found, rates = measure_threshold(auto, ring_of(one, 1), one.layer, 4, most=2000)
    # An expert is worth its copy of 0.4 ms from 60 us a token on: 20 tokens with 3 of 8 experts.
    assert 10 <= found <= 40
    assert rates is not None
    assert rates.copy == pytest.approx(4e-4, rel=0.01)
    assert rates.token == pytest.approx(20e-6 * 8 / 3 / 5, rel=0.1)
    assert re.search(rf"=auto is {found}: .* ms streamed; shared by the CPU, to wh", caplog.text)
    one.close()


def test_ranks_choose_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranks of different speeds, in threads. The slowest times decide for all of them."""
    ranks, local = [], threading.local()
    for cpu, copy, products in ((1e-5, 9e-3, 1e-6), (9e-5, 1e-3, 2e-6), (2e-5, 2e-3, 3e-6)):
        one = make(monkeypatch, bus=0, cpu=cpu, products=products)
        one._speeds.bus = one.layer.size() / copy
        ranks.append(one)
    clock = SimpleNamespace(perf_counter=lambda: local.machine.now)
    monkeypatch.setattr(break_even, "time", clock)
    monkeypatch.setattr(streamed, "run", lambda *x: local.machine.streamed(*x))
    monkeypatch.setattr(shared, "run", lambda *x: local.machine.shared(*x))
    table: dict[int, Sequence[float]] = {}
    barrier = threading.Barrier(len(ranks), timeout=60)
    chosen: dict[int, int] = {}

    def run(rank: int) -> None:
        local.machine = ranks[rank]

        def slowest(mine: Sequence[float]) -> Sequence[float]:
            table[rank] = mine
            barrier.wait()
            largest = [max(all) for all in zip(*table.values(), strict=True)]
            barrier.wait()
            return largest

        auto = MeasuredThreshold(torch.bfloat16, slowest)
        one = ranks[rank]
        chosen[rank], _ = measure_threshold(auto, ring_of(one, 1), one.layer, 4, most=4000)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(chosen) == 3
    assert len(set(chosen.values())) == 1
    assert abs(chosen[0] - 100) <= 100 // 8  # A copy takes 9 ms, a token 90 us.
    for one in ranks:
        one.close()
