"""This machine, from what `lvllm doctor` found and measured."""

import re

from lvllm.engine.weight_formats import FORMATS, activation_bits
from lvllm.machine.report import Gpu as GpuFacts
from lvllm.machine.report import MachineReport, Product
from lvllm.planning.errors import PlanError
from lvllm.planning.machine import CPUS, GPUS, Gpu, Machine, gpu_like

__all__ = ["of_report"]

# What products of a layer reach of the rate in registers, with many tokens. Measured on Zen 3 and
# Zen 5: 84% with floats, 70 to 74% with pairs of bf16, 60% with 16-bit integers, and 47 to 60% with
# bytes, whose scales take the rest. With AMX, reading weights and scaling sums take most of it.
REACHED = {
    "float": 0.84,
    "bf16": 0.72,
    "int16": 0.6,
    "int8": 0.48,
    "bf16 tiles": 0.2,
    "int8 tiles": 0.08,
}


def of_report(report: MachineReport) -> Machine:
    """The machine of a report.

    Raises:
        PlanError: if the report lacks what a plan needs: the engine did not start, or the memory's
            read bandwidth was not measured.
    """
    started, measured = report.engine, report.measured
    if started.error is not None or started.threads is None:
        raise PlanError(f"the engine does not start: {started.error}; `lvllm doctor` says more")
    if measured is None or measured.read_gb_per_s is None:
        raise PlanError("the report has no read bandwidth: `lvllm doctor --json` measures it")
    memory = report.kernel.memory_bytes
    if isinstance(report.limits.memory_limit_bytes, int):
        memory = min(memory or report.limits.memory_limit_bytes, report.limits.memory_limit_bytes)
    if memory is None:
        raise PlanError("the report has no size of the memory")
    gpus = [gpu for gpu in report.gpus if gpu.memory_bytes]
    bus = min((copy.copy_gb_per_s for copy in measured.copies), default=None)
    return Machine(
        cores=started.threads,
        nodes=max(1, len(started.nodes)),
        memory_bytes=memory,
        read_gb_per_s=measured.read_gb_per_s,
        giga_products_per_core=_products(started.products),
        isa=started.isa or "avx2",
        gpus=len(gpus),
        gpu=_gpu(min(gpus, key=lambda gpu: gpu.memory_bytes or 0), bus) if gpus else None,
    )


def _products(products: list[Product]) -> dict[str, float]:
    """The rate of each format with the bits of activations that LK_ACTIVATION_BITS gives it.

    With LK_ISA, the engine measures nothing, and the rates are those of such a CPU.
    """
    rates = {}
    for product in products:
        bits = activation_bits(product.format, None)
        if product.activation_bits != bits or product.format not in FORMATS:
            continue  # `Machine` knows what blocks of GGUF reach of another format's rate.
        if product.giga_weights_per_s_and_core is None:
            rates[product.format] = CPUS[product.isa][product.format]
        else:
            reached = REACHED.get(product.multiplied_as, min(REACHED.values()))
            rates[product.format] = reached * product.giga_weights_per_s_and_core
    return rates


def _gpu(facts: GpuFacts, bus: float | None) -> Gpu:
    """A card that nvidia-smi describes, with the maker's rates if its name is known."""
    words = set(re.split(r"[^a-z0-9]+", (facts.name or "").lower()))
    known = (gpu for name, gpu in GPUS.items() if set(name.split("-")) <= words)
    memory = float(facts.memory_bytes or 0)
    found = next(known, None) or gpu_like(memory)
    update = {"memory_bytes": memory} | ({} if bus is None else {"bus_gb_per_s": bus})
    return found.model_copy(update=update)
