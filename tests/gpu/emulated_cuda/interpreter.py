"""Computes Triton's kernels in its interpreter after they were compiled and started."""

import ctypes
import functools
import os
from typing import Any

import torch
from torch.utils._pytree import tree_map

from tests.gpu.emulated_cuda.operations import enqueue, host_view, is_on_device, runtime

__all__ = ["compute_kernels", "repair"]


@functools.cache
def _interpreted(function: Any) -> Any:
    from triton.runtime.interpreter import InterpretedFunction

    return InterpretedFunction(function)


def compute_kernels(jit: Any) -> None:
    """Let `triton.runtime.jit` compute each kernel that it starts.

    The interpreter does not know all of the language. A kernel for which it fails is named once,
    and leaves what was in memory.
    """
    start = jit.JITFunction.run
    failed: set[str] = set()
    computes = os.environ.get("EMULATED_CUDA_VALUES") != "0"

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = start(self, *args, grid=grid, warmup=warmup, **kwargs)
        if warmup or not computes:
            return kernel
        given = {name: value for name, value in kwargs.items() if name in self.arg_names}
        on_host = tree_map(_readable, (args, given))

        def work() -> None:
            from triton.runtime.errors import InterpreterError

            try:
                _interpreted(self.fn)[grid](*on_host[0], **on_host[1])
            except InterpreterError as error:
                if self.__name__ not in failed:
                    failed.add(self.__name__)
                    print(f"not computed: {self.__name__}: {error}", flush=True)

        enqueue(work)
        return kernel

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        from triton.runtime import interpreter

        # Without this, the language would stay changed after the kernel, and not compile any more.
        scope = interpreter._patch_lang(self.fn)
        try:
            return _interpreted(self.fn).rewrite()(*args, **kwargs)
        finally:
            scope.restore()

    jit.JITFunction.run = run
    jit.JITFunction.__call__ = call


def _readable(value: Any) -> Any:
    """Return a kernel's argument for the host. Raises RuntimeError if the device cannot read it."""
    if is_on_device(value):
        return host_view(value)
    if isinstance(value, torch.Tensor) and not runtime().emulated_device_can_read(
        ctypes.c_void_p(value.data_ptr())
    ):
        raise RuntimeError("a kernel reads host memory that is not pinned")
    return value


def repair(interpreter: Any) -> None:
    """Let `triton.runtime.interpreter` compute what it cannot or what a GPU computes otherwise."""
    import numpy as np

    bf16, f32 = interpreter.tl.bfloat16, interpreter.tl.float32
    builder = interpreter.InterpreterBuilder
    dot, convert = builder.create_dot, interpreter._convert_float

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != bf16:
            return handle
        data = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(data, f32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        # bfloat16 is held as 16-bit integers, which would be multiplied.
        return dot(self, widened(a), widened(b), *rest)

    def convert_float(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if source != f32 or target != bf16:
            return convert(data, source, target, mode)
        bits = data.astype(np.float32).view(np.uint32)  # A GPU rounds to nearest even.
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)

    builder.create_dot = create_dot
    interpreter._convert_float = convert_float
    interpreter._interpreter = _Memory(interpreter._interpreter)


class _Memory:
    """The interpreter's access to memory, also by the device's addresses that lie in memory."""

    def __init__(self, interpreter: Any) -> None:
        places = [ctypes.c_uint64() for _ in range(3)]
        runtime().emulated_arena(*(ctypes.byref(place) for place in places))
        self._device, self._host, self._size = (place.value for place in places)
        self._interpreter = interpreter

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._interpreter, name)
        if name not in ("load", "store", "atomic_cas", "atomic_rmw"):
            return function
        at = 1 if name == "atomic_rmw" else 0

        def translated(*args: Any) -> Any:
            import numpy as np

            pointers, end = args[at], np.uint64(self._device + self._size)
            inside = (pointers >= np.uint64(self._device)) & (pointers < end)
            if inside.any():
                shift = np.uint64((self._host - self._device) % (1 << 64))
                pointers = np.where(inside, pointers + shift, pointers)
            return function(*args[:at], pointers, *args[at + 1 :])

        return translated
