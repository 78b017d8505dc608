"""Tests the watchdog: it names a step that hangs, and does nothing otherwise."""

import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from lvllm.faults import process
from lvllm.gpu import groups
from lvllm.gpu import watchdog as watchdogs
from lvllm.gpu.ring import StagingRing
from lvllm.gpu.stand_in import StandInStream
from lvllm.gpu.watchdog import Watchdog
from tests.gpu.streams import RecordedAhead

SHORT = 1.0
"""The seconds that a step may take here."""
LONG = 30.0

LAYERS = {n: {"w13": torch.zeros(1, 1000, dtype=torch.uint8)} for n in (3, 4, 7, 8)}


class Lines(list[str]):
    """The lines that a watchdog ended with."""

    def __init__(self) -> None:
        super().__init__()
        self.said = threading.Event()

    def add(self, line: str) -> None:
        self.append(line)
        self.said.set()


@pytest.fixture
def lines() -> Lines:
    return Lines()


@pytest.fixture
def accelerator() -> Iterator[RecordedAhead]:
    one = RecordedAhead()
    yield one
    one.close()


def line(step: str) -> str:
    return f"{step} has not happened for 1 s (LVLLM_WATCHDOG_SECONDS): the process ends"


@pytest.mark.parametrize(
    ("hangs", "step"),
    [("copy", "layer 7: copy to the GPU"), ("compute", "layer 4: experts on the GPU")],
)
def test_a_hanging_stream_is_named(
    accelerator: RecordedAhead,
    lines: Lines,
    hangs: str,
    step: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All later layers are late, too. The first one is named."""
    watchdog, gate = Watchdog(accelerator, SHORT, lines.add), threading.Event()
    ring = StagingRing(accelerator, LAYERS, 1, 1 << 20, watchdog)
    copy = accelerator.copy

    def hang(target: torch.Tensor, source: torch.Tensor, stream: StandInStream) -> None:
        if hangs == "copy" and source.data_ptr() == LAYERS[7]["w13"].data_ptr():
            accelerator.launch(lambda: gate.wait(LONG), stream)
        copy(target, source, stream)

    monkeypatch.setattr(accelerator, "copy", hang)
    for _ in range(2):
        for number in LAYERS:
            for _ in ring.stream(number, [1]):
                if hangs == "compute" and number == 4:
                    accelerator.launch(lambda: gate.wait(LONG), accelerator.compute())
    assert lines.said.wait(LONG)
    assert lines == [line(step)]
    gate.set()
    watchdog.close()


GROUPS = {n: {"w13": torch.zeros(6, 1000, dtype=torch.uint8)} for n in (3, 4, 7)}
"""Layers of six groups."""


@pytest.mark.parametrize(
    ("hangs", "step"),
    [
        ("copy", r"layer 7: copy to the GPU(, behind layer \d: experts on the GPU,)?"),
        ("compute", r"(layer \d: copy to the GPU, behind )?layer 4: experts on the GPU,?"),
    ],
)
def test_a_layer_of_many_groups_is_marked_once(
    accelerator: RecordedAhead,
    lines: Lines,
    hangs: str,
    step: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each mark is a copy back, which takes the place of one of weights. Any group may hang."""
    monkeypatch.setattr(groups, "GROUP_BYTES", 1000)
    watchdog, gate = Watchdog(accelerator, SHORT, lines.add), threading.Event()
    ring = StagingRing(accelerator, GROUPS, 1, 9000, watchdog)
    for _ in range(5):
        for number in GROUPS:
            list(ring.stream(number, [1] * 6))
        accelerator.synchronize(accelerator.compute())
        ring.settle()
    marks = [source for source in accelerator.sources if source.nbytes == 4]
    copies = [source for source in accelerator.sources if source.nbytes == 1000]
    assert len(copies) >= 5 * 3 * 6
    assert len(marks) <= 3 * (5 * 3 + 1)
    group = random.randrange(6)
    copy = accelerator.copy

    def hang(target: torch.Tensor, source: torch.Tensor, stream: StandInStream) -> None:
        if hangs == "copy" and source.data_ptr() == GROUPS[7]["w13"][group].data_ptr():
            accelerator.launch(lambda: gate.wait(LONG), stream)
        copy(target, source, stream)

    monkeypatch.setattr(accelerator, "copy", hang)
    for number in GROUPS:
        for some, _ in ring.stream(number, [1] * 6):
            if hangs == "compute" and number == 4 and some.start == group:
                accelerator.launch(lambda: gate.wait(LONG), accelerator.compute())
    assert lines.said.wait(LONG)
    assert re.match(rf"{step} has not happened for 1 s", lines[0])
    gate.set()
    watchdog.close()


class Clock:
    """A watchdog's clock, which goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def until_seen(self, watchdog: Watchdog) -> None:
        """Wait until the watchdog has seen by this clock that something has happened."""
        until = time.monotonic() + LONG
        while watchdog._happened != self.now:
            assert time.monotonic() < until
            time.sleep(0.001)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A busy machine may take any time for what is to be in time."""
    one = Clock()
    monkeypatch.setattr(watchdogs, "time", one)
    return one


def test_a_pass_may_take_longer_than_a_step(
    accelerator: RecordedAhead, lines: Lines, clock: Clock
) -> None:
    """All layers are queued at once, as on a GPU, and are due from then on."""
    watchdog = Watchdog(accelerator, SHORT, lines.add)
    ring = StagingRing(accelerator, LAYERS, 1, 1 << 20, watchdog)
    compute, gates = watchdog.follow(accelerator.compute()), [threading.Event() for _ in LAYERS]
    for number, gate in zip(LAYERS, gates, strict=True):
        for _ in ring.stream(number, [1]):
            accelerator.launch(partial(gate.wait, LONG), accelerator.compute())
        compute.mark(f"layer {number}: experts on the GPU")
    compute.mark("a step")
    for gate in gates:
        clock.now += 0.6 * SHORT
        gate.set()
        clock.until_seen(watchdog)
    accelerator.synchronize(accelerator.compute())
    assert clock.now > 2 * SHORT
    assert not lines
    watchdog.close()


def test_a_step_may_take_long_while_other_work_goes_on(
    accelerator: RecordedAhead, lines: Lines, clock: Clock
) -> None:
    """The replay of a graph is one step, in which the engine is called once a layer."""
    calls = [0]
    watchdog = Watchdog(accelerator, SHORT, lines.add, lambda: tuple(calls))
    watchdog.steps().due("a step", lambda: False)
    for _ in range(5):
        clock.now += 0.5 * SHORT
        calls[0] += 1
        clock.until_seen(watchdog)
        assert not lines
    clock.now += SHORT
    assert lines.said.wait(LONG)
    assert lines == [line("a step")]
    watchdog.close()


def test_a_step_waits_for_other_processes_for_any_time(
    accelerator: RecordedAhead, lines: Lines
) -> None:
    """Its own work is late from then on, and so is work that was due before."""
    watchdog, stream = Watchdog(accelerator, SHORT, lines.add), accelerator.stream()
    steps, received, gate = watchdog.follow(stream), threading.Event(), threading.Event()
    accelerator.launch(lambda: received.wait(LONG), stream)
    steps.mark_others()
    accelerator.launch(lambda: gate.wait(LONG), stream)
    steps.mark("a step")
    watchdog.steps().due("layer 3: experts on the CPU", gate.is_set)
    assert not lines.said.wait(2 * SHORT)
    begin = time.monotonic()
    received.set()
    assert lines.said.wait(LONG)
    assert time.monotonic() - begin > 0.7 * SHORT
    assert lines == [line("a step")]
    gate.set()
    watchdog.close()


def test_a_step_before_one_that_waits_for_others_is_late(
    accelerator: RecordedAhead, lines: Lines
) -> None:
    watchdog, stream, gate = (
        Watchdog(accelerator, SHORT, lines.add),
        accelerator.stream(),
        threading.Event(),
    )
    steps = watchdog.follow(stream)
    accelerator.launch(lambda: gate.wait(LONG), stream)
    steps.mark("a step")
    steps.mark_others()
    assert lines.said.wait(LONG)
    assert lines == [line("a step")]
    gate.set()
    watchdog.close()


def test_a_hanging_host_callback_is_named(accelerator: RecordedAhead, lines: Lines) -> None:
    watchdog, done = Watchdog(accelerator, SHORT, lines.add), [0]
    calls = watchdog.steps()
    for layer in range(5):
        calls.due(f"layer {layer}: experts on the CPU", lambda layer=layer: done[0] > layer)  # type: ignore[misc]
    calls.due(lambda: "never asked for", lambda: done[0] > 5)
    done[0] = 3
    assert lines.said.wait(LONG)
    assert lines == [line("layer 3: experts on the CPU")]
    watchdog.close()


def test_a_name_is_asked_for_when_it_is_late(accelerator: RecordedAhead, lines: Lines) -> None:
    watchdog = Watchdog(accelerator, SHORT, lines.add)
    watchdog.steps().due(lambda: "layer 5: experts on the CPU", lambda: False)
    assert lines.said.wait(LONG)
    assert lines == [line("layer 5: experts on the CPU")]
    watchdog.close()


def test_what_happens_is_left_alone_and_the_thread_sleeps(
    accelerator: RecordedAhead, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdogs, "NUMBERS", 64)  # Numbers are used again.
    watchdog = Watchdog(accelerator, LONG, lines.add)
    ring = StagingRing(accelerator, LAYERS, 2, 1 << 20, watchdog)
    looks = list[float]()
    steps = watchdog.steps()
    steps.due("layer 0: experts on the CPU", lambda: looks.append(time.monotonic()) or True)  # type: ignore[func-returns-value]
    for _ in range(40):
        for number in LAYERS:
            if random.random() < 0.9:
                assert list(ring.stream(number, [1]))
        accelerator.synchronize(accelerator.compute())
        ring.settle()
    with watchdog._changed:
        assert ring._steps is not None
        ring._steps.clear()
        assert not ring._steps.waiting
    # It slept while a step was due, and did not look again and again.
    assert len(looks) <= 1
    assert not lines
    watchdog.close()
    assert not watchdog._thread.is_alive()


def test_it_sleeps_for_good_when_nothing_is_due(accelerator: RecordedAhead, lines: Lines) -> None:
    watchdog, stream = Watchdog(accelerator, LONG, lines.add), accelerator.stream()
    steps = watchdog.follow(stream)
    for _ in range(2):
        steps.mark("layer 1: copy to the GPU")
        accelerator.synchronize(stream)
        with watchdog._changed:
            watchdog._changed.notify()  # It wakes as if a step were late.
        until = time.monotonic() + LONG
        while not (watchdog._sleeps_for_good and not steps.waiting):
            assert time.monotonic() < until
            time.sleep(0.001)
    watchdog.close()
    assert not lines


def test_a_finaliser_may_close_it_in_its_own_thread(
    accelerator: RecordedAhead, lines: Lines
) -> None:
    watchdog, closed = Watchdog(accelerator, LONG, lines.add), list[bool]()

    def collect_garbage() -> bool:
        if threading.current_thread() is watchdog._thread:
            watchdog.close()
            closed.append(True)
        return False

    watchdog.steps().due("layer 1: experts on the CPU", collect_garbage)
    watchdog._thread.join(LONG)
    assert not watchdog._thread.is_alive()
    assert closed == [True]
    assert not lines


CHILD = """
import threading, torch
from lvllm.faults.process import end_now
from lvllm.gpu.ring import StagingRing
from lvllm.gpu.stand_in import StandInAccelerator
from lvllm.gpu.watchdog import Watchdog
accelerator = StandInAccelerator()
watchdog = Watchdog(accelerator, 0.1, end_now)
ring = StagingRing(accelerator, {12: {"w2": torch.zeros(1, 9)}}, 1, 1 << 20, watchdog)
accelerator.launch(threading.Event().wait, ring._copies)
list(ring.stream(12, [1]))
"""


@pytest.mark.parametrize("front", [True, False])
def test_the_process_ends_in_one_line(front: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(process._VARIABLE, "0:0")  # not this process, and undone after the test
    if front:
        process.prepare()
    else:
        monkeypatch.delenv(process._VARIABLE)
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=60,
    )
    said = (
        "layer 12: copy to the GPU has not happened for 0.1 s (LVLLM_WATCHDOG_SECONDS): the process"
        " ends"
    )
    assert (done.returncode, done.stdout) == (1, f"lvllm: {said}\n")
    assert process.reported() == (said if front else None)


def test_steps_may_be_marked_within_and_between_steps(
    accelerator: RecordedAhead, lines: Lines
) -> None:
    """The first mark of a pipeline's later stage comes in inference mode, as vLLM's steps do."""
    watchdog = Watchdog(accelerator, LONG, lines.add)
    with torch.inference_mode():
        steps = watchdog.follow(accelerator.compute())
        steps.mark_others()
    steps.mark("a step")
    watchdog.close()
    assert not lines
