"""The simulator of GPU offload: virtual time, and predictions that can be calculated by hand."""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random, randrange

import pytest
import torch

from benchmarks.gpu_model.accelerator import SimulatedAccelerator, SimulatedStream
from benchmarks.gpu_model.decode import step
from benchmarks.gpu_model.layers import Parts
from benchmarks.gpu_model.machines import MACHINES, Overheads
from benchmarks.gpu_model.prefill import Prefill
from benchmarks.gpu_model.shared import shared
from benchmarks.gpu_model.tables import prediction_row
from benchmarks.gpu_model.vary import RATES
from lvllm.gpu.ring import StagingRing
from lvllm.planning.bits import Bits
from lvllm.planning.machine import Gpu, Machine
from lvllm.planning.shape import LayerShape, ModelShape

PAGE = Path(__file__).parents[2] / "docs/gpu-model.md"
BUS = 1e9


def test_streams_and_events_in_virtual_time() -> None:
    """The rules of lvllm/gpu/accelerator.py."""
    device = SimulatedAccelerator(BUS, queue=0)
    one, other, event = device.stream(), device.stream(), device.event()
    device.wait(event, other)  # It was never recorded, so nobody waits.
    assert device.reached(event)
    device.launch(2, one)
    device.record(event, one)
    device.launch(1, other)
    assert (one.clock, other.clock) == (2, 1)
    device.wait(event, other)
    device.record(event, one)
    device.launch(5, one)
    device.record(event, one)  # The wait above was for the first record.
    device.launch(1, other)
    assert (one.clock, other.clock) == (7, 3)
    assert not device.reached(event)
    first, second = device.mark(other), device.mark(one)
    assert device.seconds(first, second) is None
    device.synchronize(one)
    assert device.reached(event)
    assert device.seconds(first, second) == 4
    device.launch(1, other)  # Nothing begins before it is queued.
    assert other.clock == 8


def test_an_engine_serves_copies_of_all_streams_in_order() -> None:
    device = SimulatedAccelerator(BUS, queue=1e-3)
    host = torch.empty(int(BUS), dtype=torch.uint8)
    memory = device.device_memory(host.nbytes, device.compute())
    one, other, back = device.stream(), device.stream(), device.stream()
    device.copy(memory, host, one)
    device.copy(memory, host, other)
    device.copy(host, memory, back)
    assert one.clock == pytest.approx(1.001)
    assert other.clock == pytest.approx(2.001)
    assert back.clock == pytest.approx(1.003)  # The other direction has an engine of its own.
    assert (device.to_device.busy, device.to_host.busy) == (2, 1)
    with pytest.raises(ValueError, match="cannot copy"):
        device.copy(memory[1:], host, one)


@dataclass
class Watched(SimulatedAccelerator):
    """Notes which bytes of the ring are written, and when."""

    written: list[tuple[int, int, float, float]] = field(default_factory=list)

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: SimulatedStream) -> None:
        super().copy(target, source, stream)
        begin = int(target.storage_offset())
        end = stream.clock
        self.written.append(
            (begin, begin + int(target.nbytes), end - source.nbytes / self.bus, end)
        )


def test_the_ring_writes_no_byte_that_is_read() -> None:
    """Each read has its bytes whole, and no copy begins before the reads of these bytes end."""
    draw = Random(randrange(1 << 30))
    device = Watched(BUS)
    sizes = {number: draw.randrange(1 << 20, 20 << 20) for number in range(6)}
    layers = {
        number: {"w13": torch.empty((9, size), dtype=torch.uint8)} for number, size in sizes.items()
    }
    ring = StagingRing(device, layers, ahead=2, limit=70 << 20)
    reads = []
    for _ in range(2):
        for number, size in sizes.items():
            device.launch(draw.random() * 0.1, device.compute())
            device.synchronize(device.compute())
            counts = [draw.randrange(2) for _ in range(9)]
            for some, tensors in ring.stream(number, counts):
                begin, place = device.mark(device.compute()), tensors["w13"].storage_offset()
                device.launch(draw.random() * size * len(some) / BUS, device.compute())
                end = device.compute().clock
                # The copy that this reads is the last one that has been queued for these bytes.
                copied = [x for x in device.written if x[:2] == (place, place + size * len(some))]
                assert copied[-1][3] <= begin
                reads.append((place, place + size * len(some), begin, end, len(device.written)))
    assert len(reads) > 20
    for low, high, _, end, known in reads:
        later = device.written[known:]
        # A nanosecond is for the rounding of `begins`, which is calculated from the copy's end.
        assert all(begins >= end - 1e-9 for a, b, begins, _ in later if a < high and low < b)


LAYER = LayerShape(0, experts=16, chosen=4, expert=3 << 20, others=1 << 20)
MODEL = ModelShape(
    name="made up",
    layers=tuple(replace(LAYER, number=number) for number in range(40)),
    hidden=1024,
    embedding=1 << 20,
    head=1 << 20,
    tied=False,
    context=8192,
    bits=Bits("int4", 4.125, 4.125),
)


def parts_with(bus: float, tflop: float, products: float = 1e-3) -> Parts:
    """Parts with these rates, a GPU memory of 1 TB/s, and nothing else that takes time."""
    gpu = Gpu(
        name="made up",
        memory_bytes=1e11,
        read_gb_per_s=1250,
        bf16_tflop_per_s=tflop,
        bus_gb_per_s=bus,
    )
    machine = Machine(
        cores=1,
        nodes=1,
        memory_bytes=1e12,
        read_gb_per_s=100,
        giga_products_per_core={"int4": products, "bf16": products},
        gpus=1,
        gpu=gpu,
    )
    return Parts(MODEL, machine, Overheads(0, 0, 0, 0, 0, 0))


def test_prefill_that_the_bus_bounds_takes_the_copies() -> None:
    prefill = Prefill(parts_with(bus=10, tflop=1000))
    assert prefill.threshold == 1  # lk is slow here.
    spent = prefill.prompt(4096)
    copies = MODEL.routed * 4.125 / 8 / 10e9
    assert spent.seconds == pytest.approx(copies, rel=0.03)
    assert spent.bus == pytest.approx(copies, rel=0.03)
    assert spent.bound == "bus"


def test_prefill_that_the_gpu_bounds_takes_the_products() -> None:
    spent = Prefill(parts_with(bus=90, tflop=10)).prompt(4096)
    # Half of the rate is reached, and a product is two operations.
    weights = sum(layer.chosen * layer.expert + layer.others for layer in MODEL.layers)
    products = 4096 * weights / (0.5 * 10e12 / 2)
    assert spent.seconds == pytest.approx(products, rel=0.03)
    assert spent.bound == "GPU"


def test_the_break_even_is_where_lk_takes_as_long_as_the_copy() -> None:
    prefill = Prefill(parts_with(bus=10, tflop=1000, products=1000))
    copy = LAYER.routed * 4.125 / 8 / 10e9
    tokens = copy * 1000e9 / (LAYER.chosen * LAYER.expert)
    assert prefill.threshold == pytest.approx(tokens, rel=0.1)
    both = shared(prefill, prefill.parts, prefill.threshold)
    assert both.share == pytest.approx(0.5, abs=0.05)
    assert both.gain == pytest.approx(2, rel=0.1)
    below = prefill.prompt(prefill.threshold // 2)
    assert below.bus == 0
    assert below.lk == pytest.approx(below.seconds, rel=0.1)


def test_decoding_takes_what_is_calculated_by_hand() -> None:
    parts = parts_with(bus=10, tflop=1000, products=1000)
    reading = LAYER.chosen * LAYER.expert * 4.125 / 8 / 88e9  # 88% of 100 GB/s
    gpu = (40 * LAYER.others + MODEL.head) * 4.125 / 8 / 1e12  # 80% of 1250 GB/s
    calls = 20e-6 + 2 * 1024 * 2 / 10e9  # lk wakes up; activations of 16 bits go there and back.
    plain = step(parts, 1, 0)
    assert 1 / plain.rate == pytest.approx(gpu + 40 * (reading + calls), rel=1e-3)
    assert plain.bound == "host memory"
    half = step(parts, 1, 0, saved=0.5)
    assert 1 / half.rate == pytest.approx(gpu + 40 * (reading / 2 + calls), rel=1e-3)
    # What is deferred hides behind the GPU's part and the calls.
    late = step(parts, 1, 0, deferred=0.1)
    assert 1 / late.rate == pytest.approx(gpu + 40 * (0.9 * reading + calls), rel=1e-3)
    on_gpu = step(parts, 1, 0, resident=40)
    read = LAYER.chosen * LAYER.expert * 4.125 / 8 / 1e12
    assert 1 / on_gpu.rate == pytest.approx(gpu + 40 * read, rel=1e-3)


@pytest.mark.parametrize("rate", RATES)
def test_each_rate_can_be_varied(rate: str) -> None:
    """A higher rate makes something faster, and nothing slower."""
    base = Parts(MODEL, MACHINES["2 x 3090 server"])
    before, after = (
        (
            parts.dense(LAYER, 512, 512, 0),
            parts.handed_over(512),
            parts.lk(LAYER, 512),
            parts.lk(LAYER, 1),
            parts.products(LAYER, 1),
            parts.overheads.step,
            1 / parts.bus,
        )
        for parts in (base, RATES[rate](base, 1.25))
    )
    assert all(new <= old for old, new in zip(before, after, strict=True))
    assert before != after


@pytest.mark.parametrize(
    "which",
    [("Qwen3-30B-A3B", "int4", "2 x 3090 server"), ("DeepSeek-V3", "int4", "4090 desktop")],
)
def test_the_page_has_the_predictions(which: tuple[str, str, str]) -> None:
    row = "| " + " | ".join(prediction_row(*which)) + " |"
    assert re.sub(r" +", " ", row) in re.sub(r" +", " ", PAGE.read_text()), (
        "python -m benchmarks.gpu_model > docs/gpu-model.md"
    )
