"""What the engine counts: the layout of `LayerCounters` as Python reads it."""

import ctypes
import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from lvllm.engine import counters
from lvllm.engine.counters import SIZES, Reason
from lvllm.engine.ops import raw_ops
from tests.engine.random_case import Case

pytestmark = pytest.mark.usefixtures("default_settings")


def counted(case: Case) -> torch.Tensor:
    numbers = torch.zeros(counters.size(case.layer.num_experts), dtype=torch.int64)
    counters.count(case.layer.handle, numbers)
    return numbers


def test_a_call_is_counted() -> None:
    case = Case(11, 128, 64, 6, 3, skip=0.2)
    numbers = counted(case)
    case.run()
    case.run()
    routed = case.ids[case.ids >= 0].long().bincount(minlength=6)
    active = int((routed > 0).sum())
    of = {reason: numbers[3 * reason : 3 * reason + 3].tolist() for reason in Reason}
    assert of[Reason.NO_GPU][:2] == [2, 22]
    assert of[Reason.NO_GPU][2] > 0
    assert all(of[reason] == [0, 0, 0] for reason in Reason if reason is not Reason.NO_GPU)
    assert numbers[counters.WAITED] == 0
    assert numbers[counters.READS] == 2 * active
    passes = numbers[counters.PASSES : counters.PASSES + len(SIZES)].tolist()
    place = next(at for at, most in enumerate(SIZES) if most is None or active <= most)
    assert passes[place] == sum(passes) == 2
    assert numbers[counters.TOKENS_OF_EXPERTS :].tolist() == (2 * routed).tolist()


@pytest.mark.parametrize("reason", Reason)
def test_a_host_call_is_counted_by_its_reason(reason: Reason) -> None:
    case = Case(5, 64, 32, 4, 2)
    numbers = counted(case)
    x, ids, weights = case.x.contiguous(), case.ids.int(), case.weights
    y = torch.empty_like(x)
    address = raw_ops.host_call_create()
    raw_ops.host_call_fill(address, int(case.layer.handle), x, ids, weights, y, 0, reason)
    call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(raw_ops.host_call_function())
    call(address)
    assert numbers[counters.calls(reason)] == 1
    assert numbers[counters.tokens(reason)] == 5
    assert numbers[counters.nanoseconds(reason)] > 0
    assert numbers[: counters.WAITED].view(-1, 3)[:, 0].sum() == 1


def test_nothing_is_counted_after_the_end() -> None:
    case = Case(3, 64, 32, 4, 2)
    numbers = counted(case)
    counters.count(case.layer.handle, None)
    case.run()
    assert not numbers.any()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (torch.zeros(32, dtype=torch.int64), "counters has 32 elements, wanted 33"),
        (torch.zeros(33, dtype=torch.int32), "counters must be a contiguous int64"),
        (torch.zeros(60, dtype=torch.int64)[::2], "counters must be a contiguous int64"),
    ],
)
def test_other_memory_is_refused(wrong: Any, said: str) -> None:
    case = Case(3, 64, 32, 4, 2)
    assert counters.size(4) == 33
    with pytest.raises(ValueError, match=said):
        counters.count(case.layer.handle, wrong)


def test_the_engine_keeps_the_memory(tmp_path: Path) -> None:
    """The counters of a layer stay, also when nobody else has them."""
    case, file = Case(3, 64, 32, 4, 2), tmp_path / "numbers"
    file.write_bytes(bytes(8 * counters.size(4)))
    numbers = torch.from_file(str(file), shared=True, size=counters.size(4), dtype=torch.int64)
    counters.count(case.layer.handle, numbers)
    del numbers
    gc.collect()
    case.run()
    found = torch.from_file(str(file), shared=True, size=counters.size(4), dtype=torch.int64)
    assert found[counters.calls(Reason.NO_GPU)] == 1
