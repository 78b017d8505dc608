"""Machines that are described."""

import pytest

from lvllm.planning.description import Description, machine_of
from lvllm.planning.errors import PlanError
from lvllm.planning.machine import CPUS, GPUS, Machine
from lvllm.units import GIB
from tests.planning.made_up import machine


def never() -> Machine:
    raise AssertionError("this machine was asked")


WHOLE = {"memory_bytes": 64 * GIB, "cores": 8, "read_gb_per_s": 50.0, "isa": "avx2"}


def test_a_whole_description_asks_nobody() -> None:
    made = machine_of(Description(**WHOLE), never)  # type: ignore[arg-type]
    assert (made.cores, made.nodes, made.read_gb_per_s, made.gpus) == (8, 1, 50, 0)
    assert made.giga_products_per_core == CPUS["avx2"]
    other = machine_of(Description(**WHOLE | {"isa": "amx"}), never)  # type: ignore[arg-type]
    assert (made.isa, other.isa) == ("avx2", "amx")


def test_the_rest_is_as_it_is_here() -> None:
    here = machine(cores=16, gpus=2)
    made = machine_of(Description(memory_bytes=1000, nodes=4), lambda: here)
    assert made == here.model_copy(update={"memory_bytes": 1000, "nodes": 4})
    assert machine_of(Description(gpus=0), lambda: here).gpus == 0
    assert machine_of(Description(gpus=0), lambda: here).gpu is None


def test_gpus() -> None:
    named = machine_of(Description(**WHOLE, gpu="h100", gpus=4), never)  # type: ignore[arg-type]
    assert (named.gpus, named.gpu) == (4, GPUS["h100"])
    sized = machine_of(Description(**WHOLE, gpu_memory_bytes=24 * GIB, bus_gb_per_s=12), never)  # type: ignore[arg-type]
    assert sized.gpus == 1
    assert sized.gpu == GPUS["rtx-3090"].model_copy(update={"bus_gb_per_s": 12})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"isa": "neon"}, "--isa neon: allowed are portable, "),
        ({"gpu": "voodoo"}, "--gpu voodoo: known are rtx-3060, "),
        ({"cores": 4}, "--cores needs --bandwidth"),
        (WHOLE | {"gpus": 2}, "--gpus and --bus need --gpu or --gpu-memory"),
        (WHOLE | {"gpus": 0, "gpu": "h100"}, "--gpus 0 describes no GPU"),
    ],
)
def test_contradictions(given: dict[str, object], said: str) -> None:
    with pytest.raises(PlanError) as error:
        machine_of(Description(**given), never)  # type: ignore[arg-type]
    assert str(error.value).startswith(said)
