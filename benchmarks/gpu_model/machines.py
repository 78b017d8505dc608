"""The machines of the predictions, as rates.

A GPU's memory and products are those of lvllm/planning/machine.py (the maker's data sheets), of
which lvllm/planning/gpu_time.py takes 80% and 50%. The bus is what FreeToken's authors measured
from pinned memory: 25.1 GB/s to a 4090, 52.7 to a 5090 and 25.3 to a 3090
(https://github.com/FlashML-org/FreeToken, docs/freetoken-paper-benchmark-spec.md). The H200's has
not been found, and is taken to be a 5090's, which has the same PCIe 5.0 x16.
"""

from dataclasses import dataclass

from lvllm.planning import gpu_time
from lvllm.planning.machine import CPUS, GPUS, Machine
from lvllm.units import GIB

__all__ = ["MACHINES", "NAMES", "Overheads"]

READ = 0.85
"""The share of the nominal bandwidth of host memory that is read, as in benchmarks/plans."""
BUS = {"rtx-4090": 25.1, "rtx-5090": 52.7, "rtx-3090": 25.3, "h200": 52.7}
SYSTEM = 4
"""LvLLM leaves so many cores to the system."""


@dataclass(frozen=True)
class Overheads:
    """What is neither bytes nor products, in seconds. All of it is assumed."""

    exchange: float = 5e-6
    """One of the two kernels that copy activations, without its bytes."""
    call: float = 30e-6
    """The GPU calls lk with `hostfunc` and goes on: a thread of the driver wakes up."""
    mailbox: float = 10e-6
    """The same with a mailbox, whose thread spins: two words pass over the bus."""
    reduce: float = 30e-6
    """Two cards add up their parts, without the bytes. There are two such sums in a layer."""
    layer: float = gpu_time.LAYER
    """The starts of a layer's kernels, in a graph."""
    step: float = gpu_time.STEP
    """vLLM's own part of a step."""


def _machine(
    cores: int,
    nodes: int,
    gib: int,
    nominal: float,
    isa: str,
    gpu: str,
    gpus: int = 1,
) -> Machine:
    return Machine(
        cores=cores,
        nodes=nodes,
        memory_bytes=gib * GIB,
        read_gb_per_s=READ * nominal,
        giga_products_per_core=CPUS[isa],
        gpus=gpus,
        gpu=GPUS[gpu].model_copy(update={"bus_gb_per_s": BUS[gpu]}),
    )


MACHINES = {
    "4090 desktop": _machine(16 - SYSTEM, 1, 192, 89.6, "avx512_bf16", "rtx-4090"),
    "5090 server": _machine(64 - SYSTEM, 1, 768, 460.8, "avx512_bf16", "rtx-5090"),
    # 16 of 56 cores: a Sapphire Rapids core is taken to read 12 GB/s at most, so that 16 cores do
    # not reach the socket's 307 GB/s. lk with AMX was timed on two cores.
    "H200, 16 cores": _machine(16 - SYSTEM, 1, 128, 16 * 12 / READ, "amx", "h200"),
    "2 x 3090 server": _machine(128 - SYSTEM, 2, 512, 409.6, "avx2", "rtx-3090", 2),
}

NAMES = {
    "4090 desktop": "Ryzen 9 9950X, 2 channels of DDR5-5600, 192 GiB, RTX 4090",
    "5090 server": "EPYC 9554P, 12 channels of DDR5-4800, 768 GiB, RTX 5090",
    "H200, 16 cores": "16 cores of a Xeon 8480+, 128 GiB of DDR5-4800, H200",
    "2 x 3090 server": "2 EPYC 7763, 8 channels of DDR4-3200 each, 512 GiB, 2 RTX 3090",
}
