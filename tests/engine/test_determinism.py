"""Threads, NUMA nodes and the rest of the batch must not change a bit of a result."""

import threading

import pytest
import torch

from lvllm import engine
from tests.engine.random_case import BOTH, ISAS, Case

pytestmark = pytest.mark.usefixtures("default_settings")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("format", "bits"), BOTH)
def test_threads_and_nodes_do_not_change_a_bit(isa: str, format: str, bits: int) -> None:
    engine.configure(isa=isa, threads=1)
    sizes = (1, 3, 67)
    made = [Case(m, 257, 130, 5, 3, format=format, activation_bits=bits, skip=0.1) for m in sizes]
    want = [case.run() for case in made]
    for topology in (
        "1 node x 2 cores x 1 threads",
        "1 node x 5 cores x 2 threads",
        "2 nodes x 3 cores x 2 threads",
        "3 nodes x 4,2,0 cores x 1 threads",
        "4 nodes x 1 cores x 1 threads",
        "8 nodes x 1,2,1,1,1,1,1,1 cores x 1 threads",
        "32 nodes x 1 cores x 1 threads",
    ):
        for threads in (None, 1):
            engine.configure(isa=isa, topology=topology, threads=threads)
            for case, expected in zip(made, want, strict=True):
                for _ in range(2):
                    assert torch.equal(case.run(), expected), topology


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("format", "bits"), BOTH)
def test_a_token_does_not_depend_on_its_batch(isa: str, format: str, bits: int) -> None:
    engine.configure(isa=isa)
    case = Case(61, 130, 257, 2, 2, format=format, activation_bits=bits, bias=True)
    together = case.run()
    for part in (slice(0, 1), slice(17, 18), slice(60, 61), slice(3, 9), slice(20, 53)):
        alone = case.layer(case.x[part], case.ids[part], case.weights[part])
        assert torch.equal(alone, together[part])


def test_calls_from_several_threads_take_turns() -> None:
    cases = [Case(m, 130, 64, 4, 2, seed=m) for m in (1, 2, 9, 33)]
    want = [case.run() for case in cases]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(50):
            if not torch.equal(cases[i].run(), want[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert not any(thread.is_alive() for thread in threads)
