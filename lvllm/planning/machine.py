"""The machine that a plan is for, and how fast parts that people have are."""

from typing import Annotated, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from lvllm.units import GIB

__all__ = ["BLOCKS", "CPUS", "GPUS", "Gpu", "Machine", "gpu_like"]

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class Gpu(BaseModel):
    """One kind of card. The rates are the maker's numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    memory_bytes: Positive
    read_gb_per_s: Positive
    """How fast the card reads its own memory."""
    bf16_tflop_per_s: Positive
    bus_gb_per_s: Positive
    """How fast it reads pinned memory of the host."""


class Blocks(NamedTuple):
    """How fast a type of GGUF is, compared with int4 in groups of 32."""

    products: float
    """The share of int4's rate of products that is reached with many tokens."""
    least_bits: float
    """With one token, unpacking limits a core to the weights that so many bits of int4 are."""


class Machine(BaseModel):
    """What limits the speed of a model. One GB is 1e9 bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cores: Count
    """Those that compute."""
    nodes: Count
    """NUMA nodes."""
    memory_bytes: Positive
    read_gb_per_s: Positive
    """How fast all cores together read memory, each that of its own node."""
    giga_products_per_core: dict[str, float]
    """Products of a weight and an activation that a core computes a second with many tokens, by the
    format of the weights."""
    isa: str = "avx2"
    """The instruction set of its kernels, by which GGUF's types have other rates."""
    gpus: int = Field(default=0, ge=0)
    gpu: Gpu | None = None
    """None: there is no GPU."""

    def products(self, format: str) -> float:
        """Products a second of all cores."""
        rate = self.giga_products_per_core.get(format)
        if rate is None:  # blocks of GGUF
            rate = self._blocks[format].products * self.giga_products_per_core["int4"]
        return 1e9 * self.cores * rate

    def least_bits(self, format: str) -> float:
        """To read a weight takes at least as long as so many bits of int4 take."""
        return self._blocks[format].least_bits if format in self._blocks else 0

    @property
    def _blocks(self) -> dict[str, Blocks]:
        return BLOCKS["avx512_vnni" if self.isa in AVX512_VNNI else "avx2"]


# Timed beside int4 in the shape of Qwen3-30B-A3B, with 2048 tokens and with one, on Zen 3 (avx2;
# IQ1, IQ2 and IQ3 on Zen 4 with the kernels of avx2) and on Zen 4 (avx512_bf16, which has the
# kernels of avx512_vnni for these types, and those of avx512_vbmi for IQ2_XS and IQ2_S). For
# instruction sets that were not timed, the rates of avx2 are an estimate.
BLOCKS: dict[str, dict[str, Blocks]] = {
    "avx2": {
        "q2_k": Blocks(0.55, 4.4),
        "q3_k": Blocks(0.84, 5.8),
        "q4_k": Blocks(0.9, 4.5),
        "q5_k": Blocks(0.79, 5.5),
        "q6_k": Blocks(0.57, 7.7),
        "q4_1": Blocks(0.86, 5),
        "q5_0": Blocks(0.84, 5.5),
        "q5_1": Blocks(0.83, 6),
        "iq4_nl": Blocks(0.67, 5.1),
        "iq4_xs": Blocks(0.63, 5),
        "iq1_s": Blocks(0.82, 9.6),
        "iq1_m": Blocks(0.77, 12),
        "iq2_xxs": Blocks(0.68, 10),
        "iq2_xs": Blocks(0.58, 11.5),
        "iq2_s": Blocks(0.58, 13),
        "iq3_xxs": Blocks(0.67, 15),
        "iq3_s": Blocks(0.93, 18),
    },
    "avx512_vnni": {
        "q2_k": Blocks(0.71, 3.2),
        "q3_k": Blocks(0.88, 4.3),
        "q4_k": Blocks(0.82, 4.7),
        "q5_k": Blocks(0.82, 5.8),
        "q6_k": Blocks(0.51, 6.9),
        "q4_1": Blocks(0.83, 5.3),
        "q5_0": Blocks(0.98, 5.3),
        "q5_1": Blocks(0.83, 5.5),
        "iq4_nl": Blocks(1.01, 4.1),
        "iq4_xs": Blocks(0.99, 4.2),
        "iq1_s": Blocks(0.91, 9),
        "iq1_m": Blocks(0.8, 11.5),
        "iq2_xxs": Blocks(0.94, 7.6),
        "iq2_xs": Blocks(0.78, 8),
        "iq2_s": Blocks(0.72, 10),
        "iq3_xxs": Blocks(0.92, 8.1),
        "iq3_s": Blocks(0.89, 9.9),
    },
}
AVX512_VNNI = ("avx512_vnni", "avx512_vbmi", "avx512_bf16", "amx")
"""The instruction sets whose rates are those of avx512_vnni."""

# benchmarks/moe_block.py with 2048 tokens in the shape of Qwen3-30B-A3B and the default bits of
# activations: half of what two cores did, on Zen 3 (avx2), Zen 4 (avx512_vnni), Zen 5 (avx512_bf16)
# and a Xeon (amx, but for fp16 and nvfp4). The others are estimates: nobody has timed them so.
CPUS: dict[str, dict[str, float]] = {
    "portable": {"bf16": 5, "fp16": 5, "fp8": 5, "int8": 5, "int4": 5, "mxfp4": 5, "nvfp4": 5},
    "avx2": {"bf16": 35, "fp16": 34, "fp8": 37, "int8": 42, "int4": 73, "mxfp4": 67, "nvfp4": 60},
    "avx2_vnni": {
        "bf16": 35, "fp16": 34, "fp8": 37, "int8": 80, "int4": 120, "mxfp4": 110, "nvfp4": 100
    },
    "avx512": {
        "bf16": 70, "fp16": 70, "fp8": 65, "int8": 80, "int4": 140, "mxfp4": 130, "nvfp4": 120
    },
    "avx512_vnni": {
        "bf16": 70, "fp16": 70, "fp8": 65, "int8": 130, "int4": 190, "mxfp4": 180, "nvfp4": 160
    },
    "avx512_vbmi": {
        "bf16": 70, "fp16": 70, "fp8": 70, "int8": 130, "int4": 190, "mxfp4": 180, "nvfp4": 160
    },
    "avx512_bf16": {
        "bf16": 170, "fp16": 91, "fp8": 172, "int8": 185, "int4": 249, "mxfp4": 240, "nvfp4": 220
    },
    "amx": {
        "bf16": 340, "fp16": 91, "fp8": 340, "int8": 370, "int4": 250, "mxfp4": 255, "nvfp4": 200
    },
}  # fmt: skip

# Memory, its bandwidth and dense bf16 products by the makers' data sheets. Of the bus's nominal
# rate, 80 to 85% reach the card (PCIe 3: 16, PCIe 4: 32, PCIe 5: 64 GB/s).
GPUS = {
    name: Gpu(
        name=name,
        memory_bytes=memory * GIB,
        read_gb_per_s=read,
        bf16_tflop_per_s=flops,
        bus_gb_per_s=bus,
    )
    for name, (memory, read, flops, bus) in {
        "rtx-3060": (12, 360, 51, 25),
        "rtx-3090": (24, 936, 71, 25),
        "rtx-4090": (24, 1008, 165, 25),
        "rtx-5090": (32, 1792, 210, 52),
        "rtx-pro-6000": (96, 1792, 250, 52),
        "l40s": (48, 864, 181, 25),
        "a100": (80, 2039, 312, 25),
        "h100": (80, 3350, 990, 52),
        "h200": (141, 4800, 990, 52),
    }.items()
}


def gpu_like(memory_bytes: float) -> Gpu:
    """A card of this much memory, as fast as the slowest known one whose memory is nearest."""
    nearest = min(
        GPUS.values(),
        key=lambda gpu: (abs(gpu.memory_bytes - memory_bytes), gpu.read_gb_per_s),
    )
    return nearest.model_copy(update={"memory_bytes": memory_bytes})
