"""A small model and machines for tests of plans."""

from lvllm.planning.bits import Bits
from lvllm.planning.machine import CPUS, GPUS, Machine
from lvllm.planning.shape import LayerShape, ModelShape
from lvllm.units import GIB

__all__ = ["machine", "model"]


def model(
    layers: int = 8,
    dense: int = 1,
    experts: int = 64,
    chosen: int = 6,
    expert: int = 10_000_000,
    bits: float = 16,
    format: str = "bf16",
) -> ModelShape:
    """A model whose first `dense` layers have no experts."""
    made = [
        LayerShape(
            number=i,
            experts=experts if i >= dense else 0,
            chosen=chosen if i >= dense else 0,
            expert=expert if i >= dense else 0,
            others=30_000_000,
            cached=1024,
            attended=8192,
            attended_in_prompts=8192,
        )
        for i in range(layers)
    ]
    return ModelShape(
        name="made-up",
        layers=tuple(made),
        hidden=2048,
        embedding=100_000_000,
        head=100_000_000,
        tied=False,
        context=32768,
        bits=Bits(format, bits, 16),
    )


def machine(
    gib: float = 64,
    gb_per_s: float = 100,
    cores: int = 16,
    nodes: int = 1,
    isa: str = "avx512_bf16",
    gpus: int = 0,
    gpu: str = "rtx-4090",
    gpu_gib: float | None = None,
) -> Machine:
    """A machine, with a GPU if `gpus` is not 0."""
    card = GPUS[gpu] if gpus else None
    if card is not None and gpu_gib is not None:
        card = card.model_copy(update={"memory_bytes": gpu_gib * GIB})
    return Machine(
        cores=cores,
        nodes=nodes,
        memory_bytes=gib * GIB,
        read_gb_per_s=gb_per_s,
        giga_products_per_core=CPUS[isa],
        gpus=gpus,
        gpu=card,
    )
