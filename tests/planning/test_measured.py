"""This machine, from a report of `lvllm doctor`."""

import pytest

from lvllm.engine import ISAS
from lvllm.machine.report import (
    Copy,
    Engine,
    Gpu,
    Kernel,
    Limits,
    MachineReport,
    Measured,
    Product,
    Versions,
)
from lvllm.planning.errors import PlanError
from lvllm.planning.machine import CPUS
from lvllm.planning.measured import of_report
from lvllm.units import GIB


def report() -> MachineReport:
    products = [
        Product(
            format=format,
            activation_bits=bits,
            isa="avx512_bf16",
            multiplied_as=how,
            giga_weights_per_s_and_core=rate,
        )
        for format, bits, how, rate in [
            ("bf16", 16, "bf16", 100),
            ("int4", 8, "int8", 400),
            ("int4", 16, "bf16", 100),
        ]
    ]
    return MachineReport(
        kernel=Kernel(memory_bytes=64 * GIB),
        versions=Versions(python="3.11", lvllm="1"),
        engine=Engine(isa="avx512_bf16", threads=12, nodes=[0, 1], products=products),
        measured=Measured(read_gb_per_s=80),
    )


def test_a_machine_without_a_gpu() -> None:
    made = of_report(report())
    assert (made.cores, made.nodes, made.read_gb_per_s) == (12, 2, 80)
    assert made.memory_bytes == 64 * GIB
    assert (made.isa, made.gpu) == ("avx512_bf16", None)
    # int4 has 8-bit activations by default, whose products reach 48% of the rate in registers.
    assert made.giga_products_per_core["int4"] == pytest.approx(0.48 * 400)
    assert made.giga_products_per_core["bf16"] == pytest.approx(0.72 * 100)


def test_a_cgroup_may_allow_less_memory() -> None:
    limited = report()
    limited.limits = Limits(memory_limit_bytes=10 * GIB)
    assert of_report(limited).memory_bytes == 10 * GIB


def test_gpus_are_known_by_their_names_and_measured_buses() -> None:
    found = report()
    found.gpus = [
        Gpu(name="NVIDIA GeForce RTX 5090", memory_bytes=32 * GIB),
        Gpu(name="NVIDIA GeForce RTX 5090", memory_bytes=31 * GIB),
    ]
    assert found.measured is not None
    found.measured.copies = [
        Copy(
            gpu_index=0,
            copy_gb_per_s=41,
            copy_beside_reads_gb_per_s=40,
            reads_beside_copy_gb_per_s=60,
        )
    ]
    made = of_report(found)
    assert made.gpus == 2
    assert made.gpu is not None
    assert made.gpu.name == "rtx-5090"
    assert (made.gpu.memory_bytes, made.gpu.bus_gb_per_s) == (31 * GIB, 41)


@pytest.mark.parametrize(
    ("without", "said"),
    [
        ({"engine": Engine(error="no library")}, "the engine does not start: no library"),
        ({"measured": None}, "the report has no read bandwidth"),
        ({"kernel": Kernel()}, "the report has no size of the memory"),
    ],
)
def test_a_report_that_lacks_something(without: dict[str, object], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        of_report(report().model_copy(update=without))


@pytest.mark.parametrize("isa", ISAS)
def test_where_rates_were_not_measured_they_are_those_of_such_a_cpu(isa: str) -> None:
    forced = report()
    for product in forced.engine.products:
        product.isa, product.giga_weights_per_s_and_core = isa, None
    assert of_report(forced).giga_products_per_core["int4"] == CPUS[isa]["int4"]
