"""kt-kernel, the CPU side of KTransformers: the class that it picks for each format.

int8 it quantises itself, from what the weights stand for in bf16.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.cases import Batch
from benchmarks.peers.settings import Refused, Settings
from benchmarks.weights import FP8_BLOCK, GROUP_SIZE, RandomWeights

PACKAGE = "kt-kernel"
# The first class that the build for this CPU has, bits and group size.
KERNELS = {
    "bf16": (("AMXBF16_MOE", "AVX2BF16_MOE"), 0, 0),
    "fp8": (("AMXFP8_MOE", "AVX2FP8_MOE"), 8, FP8_BLOCK),
    "int8": (("AMXInt8_MOE",), 0, 0),
    "int4": (("AMXInt4_KGroup_MOE", "AVXVNNI256RawInt4_MOE", "AVX2RawInt4_MOE"), 4, GROUP_SIZE),
    "mxfp4": (("AMXFP4_KGroup_MOE", "AVX2MXFP4_MOE"), 4, 32),
    "nvfp4": (("AVX2MXFP4_MOE",), 4, 16),
}
FORMATS = tuple(KERNELS)
MAX_TOKENS = 65536


def version() -> str:
    import kt_kernel  # type: ignore[import-not-found]

    return f"{kt_kernel.__version__} ({kt_kernel.__cpu_variant__})"


_pools: list[Any] = []


def _pool(threads: int) -> Any:
    """One for all layers, on the first NUMA node: it would want a copy of the weights for each."""
    from kt_kernel import kt_kernel_ext

    if not _pools:
        config = kt_kernel_ext.WorkerPoolConfig()
        config.subpool_count = 1
        config.subpool_numa_map = [0]
        # The caller spins while the pool works. With no core left for it they take turns in slices
        # of the scheduler: on 2 cores a token takes 8 ms of two threads, 1.2 ms of one.
        config.subpool_thread_count = [max(1, threads - 1)]
        _pools.append(kt_kernel_ext.CPUInfer(config))
    return _pools[0]


def _scales(weights: RandomWeights, name: str) -> list[torch.Tensor] | None:
    """Of each expert, in the dtype that the kernels take: float32 for fp8, bf16 for the rest."""
    pattern = weights.patterns.get(name + "_scale")
    if pattern is None:
        return None
    scales = [pattern.expert(expert) for expert in range(weights.shape.experts)]
    if weights.format == "mxfp4":
        return [torch.exp2(scale.float() - 127).bfloat16() for scale in scales]
    if weights.format == "nvfp4":
        both = weights.patterns[name + "_global_scale"]
        for expert, scale in enumerate(scales):
            factor = both.expert(expert).view(-1)
            rows = factor.repeat_interleave(scale.shape[0] // factor.numel())
            scales[expert] = (scale.float() * rows[:, None]).bfloat16()
    return scales


class Layer:
    def __init__(self, weights: RandomWeights, settings: Settings) -> None:
        from kt_kernel import kt_kernel_ext

        shape, experts = weights.shape, range(weights.shape.experts)
        names, bits, group = KERNELS[weights.format]
        kernel = next((k for n in names if (k := getattr(kt_kernel_ext.moe, n, None))), None)
        if kernel is None:
            raise Refused(f"this build has no {' or '.join(names)}")
        self._pool = _pool(settings.threads)
        self._on_gpu = torch.zeros(shape.experts, dtype=torch.bool)
        config = kt_kernel_ext.moe.MOEConfig(
            shape.experts, shape.topk, shape.hidden, shape.intermediate, self._on_gpu.data_ptr()
        )
        config.layer_idx = 0
        config.pool = self._pool.backend_
        config.max_len = MAX_TOKENS
        half = shape.intermediate
        if weights.format == "int8":
            w13 = torch.stack([weights.expert("w13", e).bfloat16() for e in experts])
            down = torch.stack([weights.expert("w2", e).bfloat16() for e in experts])
            gate, up = w13[:, :half].contiguous(), w13[:, half:].contiguous()
            config.gate_proj, config.up_proj = gate.data_ptr(), up.data_ptr()
            config.down_proj = down.data_ptr()
        else:
            tensors = weights.tensors()
            w13, w2 = tensors["w13"], tensors["w2"]
            config.gate_projs = [[w13[e, :half].data_ptr() for e in experts]]
            config.up_projs = [[w13[e, half:].data_ptr() for e in experts]]
            config.down_projs = [[w2[e].data_ptr() for e in experts]]
            none = [[0 for _ in experts]]
            config.gate_scales = config.up_scales = config.down_scales = none
            scale13, scale2 = _scales(weights, "w13"), _scales(weights, "w2")
            if scale13 is not None and scale2 is not None:
                middle = scale13[0].shape[0] // 2
                config.gate_scales = [[s.data_ptr() for s in scale13]]
                config.up_scales = [[s[middle:].data_ptr() for s in scale13]]
                config.down_scales = [[s.data_ptr() for s in scale2]]
        if bits:
            config.quant_config.bits = bits
            config.quant_config.group_size = group
            config.quant_config.zero_point = False
        self._moe = kernel(config)
        order = torch.arange(shape.experts)
        # Copies the weights to an order of its own.
        self._pool.submit(self._moe.load_weights_task(order.data_ptr()))
        self._pool.sync()

    def __call__(self, batch: Batch) -> torch.Tensor:
        out = torch.empty_like(batch.x)
        tokens = torch.tensor([batch.x.shape[0]], dtype=torch.int32)
        ids = batch.ids.long()
        # Not through the task queue, whose own thread would take a core from the pool.
        self._moe.forward(
            tokens.data_ptr(),
            ids.shape[1],
            ids.data_ptr(),
            batch.weights.data_ptr(),
            batch.x.data_ptr(),
            out.data_ptr(),
            False,
        )
        return out


def prepare(weights: RandomWeights, settings: Settings) -> Layer:
    shape = weights.shape
    if shape.hidden % FP8_BLOCK != 0 or shape.intermediate % FP8_BLOCK != 0:
        raise Refused(f"wants hidden and intermediate sizes divisible by {FP8_BLOCK}")
    return Layer(weights, settings)


def run(layer: Layer, batch: Batch) -> torch.Tensor:
    return layer(batch)
