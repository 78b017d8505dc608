"""Opens the accelerator that LVLLM_ACCELERATOR names."""

from functools import cache

from lvllm.gpu.accelerator import Accelerator
from lvllm.gpu.cuda import CudaAccelerator
from lvllm.gpu.stand_in import StandInAccelerator

__all__ = ["open_accelerator"]


@cache
def open_accelerator(name: str) -> Accelerator:
    """Return the process's accelerator called `name`: "cuda", or "host" for the stand-in.

    All models of a process share one accelerator, because it knows which pages are pinned: CUDA
    refuses to register a page twice, and small tensors of two models may lie in the same page.

    Raises:
        ValueError: for another name.
        RuntimeError: in one line, if there is no such device.
    """
    if name == "cuda":
        return CudaAccelerator()
    if name == "host":
        return StandInAccelerator()
    raise ValueError(f"accelerator is {name!r}, must be one of cuda, host")
