"""What authors of other engines published about their speed on machines with a GPU."""

from dataclasses import dataclass, replace

from benchmarks.plans.machines import MACHINES
from lvllm.planning.machine import CPUS, GPUS, Machine
from lvllm.planning.placement import Load
from lvllm.units import GIB

__all__ = ["OTHERS", "Result"]


@dataclass(frozen=True)
class Result:
    """A published result, in tokens a second of all users together."""

    what: str
    model: str
    machine: Machine
    load: Load
    """An assumption, except for the number of users."""
    prefill: float | None
    decode: float | None


def _two_epycs(gpu: str) -> Machine:
    """Two EPYC 9004 with 96 cores and 12 channels of DDR5-4800 each."""
    return Machine(
        cores=188,
        nodes=2,
        memory_bytes=1536 * GIB,
        read_gb_per_s=0.85 * 921,
        giga_products_per_core=CPUS["avx512_bf16"],
        gpus=1,
        gpu=GPUS[gpu],
    )


_LONG = Load(prompt=16384, answer=512, context=24576)
_SHORT = Load(prompt=512, answer=512, context=4096)
_MANY = replace(_SHORT, users=16, context=1024)

OTHERS = [
    Result(
        "Qwen3-Next-80B bf16, LvLLM 1.7, 2 EPYC 9555, RTX Pro 6000",
        "Qwen3-Next-80B-A3B",
        MACHINES["two EPYCs"],
        _LONG,
        15000,
        90,
    ),
    Result(
        "MiniMax-M2.1 fp8, LvLLM 1.7, 2 EPYC 9684X, RTX 5090",
        "MiniMax-M2",
        _two_epycs("rtx-5090"),
        _LONG,
        5000,
        29,
    ),
    Result(
        "DeepSeek-R1 fp8, fastllm, 2 EPYC 9004 and a GPU",
        "DeepSeek-R1",
        _two_epycs("rtx-4090"),
        _SHORT,
        None,
        20,
    ),
    Result(
        "DeepSeek-R1 int4, fastllm, 2 EPYC 9004 and a GPU",
        "DeepSeek-V3-AWQ",
        _two_epycs("rtx-4090"),
        _SHORT,
        None,
        30,
    ),
    Result(
        "DeepSeek-R1 int4, fastllm, the same with 16 users",
        "DeepSeek-V3-AWQ",
        _two_epycs("rtx-4090"),
        _MANY,
        None,
        60,
    ),
    Result(
        "DeepSeek-V3 int4, arXiv 2606.10493",
        "DeepSeek-V3-AWQ",
        _two_epycs("rtx-4090"),
        Load(prompt=8192, answer=512, context=16384),
        1200,
        28,
    ),
]
