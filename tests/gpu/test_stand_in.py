"""Tests the stand-in: the order of streams, CUDA's events, errors, the end of its threads."""

import ctypes
import random
import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from lvllm.gpu.devices import open_accelerator
from lvllm.gpu.stand_in import PIECES, WORD, StandInAccelerator

LONG = 30.0
"""Nothing here takes this many seconds. Waiting that long is a failure."""


@pytest.fixture
def host() -> Iterator[StandInAccelerator]:
    accelerator = StandInAccelerator(delay=lambda: random.choice((0.0, 0.0, 0.001)))
    yield accelerator
    accelerator.close()


def until(gate: threading.Event) -> Callable[[], None]:
    """Return work that lasts until `gate` opens."""

    def wait() -> None:
        assert gate.wait(LONG)

    return wait


def test_a_stream_keeps_its_order_and_streams_go_on_side_by_side(host: StandInAccelerator) -> None:
    one, other, gate = host.stream(), host.stream(), threading.Event()
    seen: list[int] = []
    host.launch(until(gate), one)
    for n in range(20):
        host.launch(lambda n=n: seen.append(n), one)  # type: ignore[misc]
    host.launch(gate.set, other)
    host.synchronize(one)
    assert seen == list(range(20))
    host.launch(lambda: seen.append(99), host.compute())
    assert seen[-1] == 99


def test_a_wait_is_for_the_last_record_before_it(host: StandInAccelerator) -> None:
    first, second, waiting = host.stream(), host.stream(), host.stream()
    event, gates = host.event(), [threading.Event(), threading.Event()]
    seen: list[str] = []

    host.wait(event, waiting)  # It was never recorded, so nobody waits.
    host.synchronize(waiting)
    assert host.reached(event)

    host.launch(until(gates[0]), first)
    host.record(event, first)
    host.wait(event, waiting)
    host.launch(lambda: seen.append("after the first record"), waiting)
    host.launch(until(gates[1]), second)
    host.record(event, second)  # The wait above is for the record before.
    assert not host.reached(event)
    gates[0].set()
    host.synchronize(waiting)
    assert seen == ["after the first record"]

    assert not host.reached(event)
    host.wait(event, waiting)
    host.launch(lambda: seen.append("after the second record"), waiting)
    host.synchronize(first)
    assert len(seen) == 1
    gates[1].set()
    host.synchronize(waiting)
    assert seen[1:] == ["after the second record"]
    assert host.reached(event)


def test_the_caller_waits_for_an_event(host: StandInAccelerator) -> None:
    stream, event, seen = host.stream(), host.event(), list[int]()
    for n in range(5):
        host.launch(lambda n=n: seen.append(n), stream)  # type: ignore[misc]
    host.record(event, stream)
    host.wait(event, host.compute())
    assert seen == list(range(5))


@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (PIECES * WORD + 1,), (3, 5, 7)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float8_e4m3fn])
def test_a_copy_has_the_bytes(
    host: StandInAccelerator, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    source = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    source = source.view(dtype).view(shape)
    target = torch.zeros_like(source)
    for stream in (host.stream(), host.compute()):
        target.view(-1).view(torch.uint8).zero_()
        host.copy(target, source, stream)
        host.synchronize(stream)
        assert torch.equal(target.view(-1).view(torch.uint8), source.view(-1).view(torch.uint8))


def test_a_copy_is_done_in_pieces(host: StandInAccelerator) -> None:
    """Who reads without waiting may see old bytes beside new ones."""
    stream, gate = host.stream(), threading.Event()
    source = torch.ones(PIECES * WORD, dtype=torch.uint8)
    target = torch.zeros_like(source)
    for _ in range(200):
        target.zero_()
        host.launch(until(gate), stream)
        host.copy(target, source, stream)
        gate.set()
        while not (total := int(target.sum())):
            pass
        host.synchronize(stream)
        gate.clear()
        if total < len(source):
            return
    raise AssertionError("200 copies were seen whole or not at all")


@pytest.mark.parametrize("size", [1, WORD, 100, PIECES * WORD + 1, 1000])
def test_a_copy_does_not_divide_words(
    host: StandInAccelerator, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = list[tuple[int, int]]()
    monkeypatch.setattr(host, "launch", lambda work, _: pieces.append(work.args[2:]))
    source = torch.ones(size, dtype=torch.uint8)
    host.copy(torch.zeros_like(source), source, host.stream())
    assert len(pieces) <= PIECES
    assert all(begin % WORD == 0 for begin, _ in pieces)
    assert sum(count for _, count in pieces) == size


@pytest.mark.parametrize(
    ("target", "source", "says"),
    [
        (torch.empty(3), torch.empty(4), r"^cannot copy torch.float32 \[4\] to torch.float32 \[3"),
        (torch.empty(3).half(), torch.empty(3), r"^cannot copy torch.float32 .* to torch.float16"),
        (torch.empty(3, 2).T, torch.empty(2, 3), r"^target of a copy has strides \(1, 2\)"),
        (torch.empty(2, 3), torch.empty(3, 2).T, r"^source of a copy has strides \(1, 2\)"),
    ],
)
def test_what_is_no_plain_copy_is_refused(
    host: StandInAccelerator, target: torch.Tensor, source: torch.Tensor, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        host.copy(target, source, host.stream())


def test_a_c_function_is_called_in_order(host: StandInAccelerator) -> None:
    seen: list[object] = []
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(seen.append)
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    stream = host.stream()
    host.launch(lambda: seen.append("before"), stream)
    host.call(address, 4711, stream)
    host.launch(lambda: seen.append("after"), stream)
    host.synchronize(stream)
    assert seen == ["before", 4711, "after"]
    host.call(address, 4712, host.compute())
    assert seen[-1] == 4712


@pytest.mark.parametrize("meet", ["record", "wait", "synchronize", "wait of another stream"])
def test_an_error_in_a_thread_reaches_the_caller(host: StandInAccelerator, meet: str) -> None:
    stream, event, seen = host.stream(), host.event(), list[int]()
    host.launch(lambda: [][1], stream)
    host.launch(lambda: seen.append(1), stream)
    caught = pytest.raises(RuntimeError, match=r"host stand-in: list index out of range")
    if meet == "synchronize":
        with caught:
            host.synchronize(stream)
    elif meet == "wait":
        with caught:
            host.record(event, stream)
            host.wait(event, host.compute())
    else:
        while host._error is None:
            pass
        with caught:
            (host.record if meet == "record" else host.wait)(event, host.stream())
    # Every later call raises it, too, and work after the error is not done.
    with pytest.raises(RuntimeError, match="list index out of range"):
        host.record(event, stream)
    assert not seen


def test_close_ends_threads_whatever_they_wait_for() -> None:
    host = StandInAccelerator()
    one, other, gate = host.stream(), host.stream(), threading.Event()
    never, seen = host.event(), list[int]()
    host.launch(until(gate), one)
    host.record(never, one)
    host.wait(never, other)
    host.launch(lambda: seen.append(1), other)

    def wait_for_ever() -> None:
        with pytest.raises(RuntimeError, match="closed"):
            host.wait(never, host.compute())
        gate.set()  # The first stream's work ends now.

    caller = threading.Thread(target=wait_for_ever)
    caller.start()
    host.close()
    caller.join(LONG)
    assert not any(thread.is_alive() for thread in (caller, *host._threads))
    assert not seen
    with pytest.raises(RuntimeError, match="closed"):
        host.record(never, one)
    host.close()


def test_memory() -> None:
    host = open_accelerator("host")
    assert (host.name, host.device.type, host.capturing()) == ("host", "cpu", False)
    memory = host.device_memory(17, host.compute())
    assert (memory.shape, memory.dtype) == ((17,), torch.uint8)
    assert host.pinned((2, 3), torch.bfloat16).shape == (2, 3)
    host.pin(memory)
    host.unpin(memory)
    with pytest.raises(ValueError, match=r"strides \(1, 3\), wanted a contiguous one"):
        host.pin(torch.empty(2, 3).T)
    with pytest.raises(MemoryError, match="has no 1152921504606846976 bytes"):
        host.device_memory(1 << 60, host.compute())


def test_all_models_of_a_process_share_an_accelerator() -> None:
    """Their small tensors may lie in one page, which CUDA would not register twice."""
    tensors = torch.empty(2 * WORD, dtype=torch.uint8).split(WORD)
    for tensor in tensors:
        open_accelerator("host").pin(tensor)
    for tensor in tensors:
        open_accelerator("host").unpin(tensor)
    assert open_accelerator("host") is open_accelerator("host")


def test_the_names_of_accelerators() -> None:
    with pytest.raises(ValueError, match=r"^accelerator is 'rocm', must be one of cuda, host$"):
        open_accelerator("rocm")
