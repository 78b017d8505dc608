"""Classes of machines that people have, from two data sheets: the CPU's and the GPU's.

Of a CPU's nominal memory bandwidth, 85% is taken to be read. LvLLM leaves four cores to the system.
"""

from lvllm.planning.machine import CPUS, GPUS, Machine
from lvllm.units import GIB

__all__ = ["MACHINES", "MACHINE_OF"]


def _machine(
    cores: int, nodes: int, gib: int, gb_per_s: float, isa: str, gpus: int = 0, gpu: str = ""
) -> Machine:
    return Machine(
        cores=cores - 4,
        nodes=nodes,
        memory_bytes=gib * GIB,
        read_gb_per_s=0.85 * gb_per_s,
        giga_products_per_core=CPUS[isa],
        gpus=gpus,
        gpu=GPUS[gpu] if gpu else None,
    )


MACHINES = {
    "desktop": _machine(16, 1, 192, 90, "avx512_bf16", 1, "rtx-5090"),
    "old server": _machine(64, 4, 512, 205, "avx2", 1, "rtx-3090"),
    "server": _machine(64, 1, 768, 461, "avx512_bf16", 1, "rtx-4090"),
    "server, no GPU": _machine(96, 4, 768, 461, "avx512_bf16"),
    "two Xeons": _machine(112, 2, 1024, 614, "amx", 2, "rtx-4090"),
    "two EPYCs": _machine(128, 2, 1536, 1152, "avx512_bf16", 1, "rtx-pro-6000"),
}

MACHINE_OF = {
    "desktop": "Ryzen 9 9950X, 2 channels of DDR5-5600, 192 GiB, RTX 5090",
    "old server": "EPYC 7763 (AVX2 only), 8 channels of DDR4-3200, 512 GiB, RTX 3090",
    "server": "EPYC 9554P (Zen 4), 12 channels of DDR5-4800, 768 GiB, RTX 4090",
    "server, no GPU": "EPYC 9654 (Zen 4), 12 channels of DDR5-4800, 768 GiB",
    "two Xeons": "2 Xeon 8480+ (AMX), 8 channels of DDR5-4800 each, 1 TiB, 2 RTX 4090",
    "two EPYCs": "2 EPYC 9555 (Zen 5), 12 channels of DDR5-6000 each, 1.5 TiB, RTX Pro 6000",
}
