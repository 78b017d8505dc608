"""CUDA, through PyTorch's streams and events.

What PyTorch does not offer, host callbacks and the registration of memory that is there already,
is called in the CUDA runtime that PyTorch itself has loaded: another copy of it would know neither
PyTorch's streams nor its errors.
"""

import ctypes
import os
import resource
from collections.abc import Sequence
from functools import cache

import torch

from lvllm.gpu.accelerator import Accelerator, check_copy, check_pinnable

__all__ = ["CudaAccelerator", "runtime"]

GIB = 1 << 30


class CudaAccelerator(Accelerator):
    """The process's current CUDA device."""

    name = "cuda"

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise RuntimeError("accelerator cuda: PyTorch finds no CUDA device")
        self._runtime = runtime()
        self.device = torch.device("cuda", torch.cuda.current_device())
        # Registered memory that went back to the system would leave its pages with the device.
        self._registered: dict[int, torch.Tensor] = {}

    def compute(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.device)

    def stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.device)

    def event(self) -> torch.cuda.Event:
        return torch.cuda.Event()

    def record(self, event: torch.cuda.Event, stream: torch.cuda.Stream) -> None:
        event.record(stream)

    def wait(self, event: torch.cuda.Event, stream: torch.cuda.Stream) -> None:
        stream.wait_event(event)

    def reached(self, event: torch.cuda.Event) -> bool:
        return event.query()

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: torch.cuda.Stream) -> None:
        check_copy(target, source)
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)

    def call(self, function: int, argument: int, stream: torch.cuda.Stream) -> None:
        self._check("cudaLaunchHostFunc", stream.cuda_stream, function, argument)

    def synchronize(self, stream: torch.cuda.Stream) -> None:
        stream.synchronize()

    def device_memory(self, size: int, stream: torch.cuda.Stream) -> torch.Tensor:
        try:
            memory = torch.empty(size, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError:
            free, total = torch.cuda.mem_get_info(self.device)
            raise MemoryError(
                f"of the GPU's {total / GIB:.2f} GiB, {free / GIB:.2f} GiB are free, and"
                f" {size / GIB:.2f} GiB were asked for"
            ) from None
        # PyTorch hands dropped memory on in the order of the stream that it was allocated in. This
        # makes it wait for the other one, too.
        memory.record_stream(stream)
        return memory

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)

    def pin(self, tensor: torch.Tensor) -> None:
        check_pinnable(tensor)
        if tensor.nbytes == 0:
            return
        try:
            # 0, the default: with unified addressing all devices and contexts see it.
            self._check("cudaHostRegister", tensor.data_ptr(), tensor.nbytes, 0)
        except RuntimeError as error:
            raise RuntimeError(
                f"cannot pin {tensor.nbytes} bytes ({tensor.nbytes / GIB:.2f} GiB) of host memory"
                f" for the GPU: {error};"
                f" `ulimit -l` is {_locked_limit()}; set it to unlimited (in Docker: --ulimit"
                " memlock=-1), or let the machine have more free memory"
            ) from None
        self._registered[tensor.data_ptr()] = tensor

    def unpin(self, tensor: torch.Tensor) -> None:
        if tensor.nbytes == 0:
            return
        if self._registered.pop(tensor.data_ptr(), None) is None:
            raise ValueError(f"a tensor of {tensor.nbytes} bytes was never pinned")
        self._check("cudaHostUnregister", tensor.data_ptr())

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def _check(self, function: str, *arguments: int) -> None:
        """Call it. Raises RuntimeError with CUDA's name of an error and what it says of it."""
        code = getattr(self._runtime, function)(*arguments)
        if code != 0:
            # The runtime keeps the error of a thread until it is asked for, and PyTorch would take
            # it for one of the next kernel it starts.
            self._runtime.cudaGetLastError()
            name = self._runtime.cudaGetErrorName(code).decode()
            text = self._runtime.cudaGetErrorString(code).decode()
            raise RuntimeError(f"{function}: {name} ({code}): {text}")


@cache
def runtime() -> ctypes.CDLL:
    """The CUDA runtime in this process. Raises RuntimeError if there is none of PyTorch's version.

    PyTorch holds it under its soname, whatever file that came from.
    """
    version = torch.version.cuda
    if version is None:
        raise RuntimeError(f"PyTorch {torch.__version__} is not built for CUDA")
    soname = f"libcudart.so.{version.partition('.')[0]}"
    try:
        # Only what is loaded already.
        library = ctypes.CDLL(soname, mode=os.RTLD_NOLOAD)
    except OSError:
        raise RuntimeError(
            f"PyTorch {torch.__version__} has not loaded {soname}: LvLLM needs a PyTorch that"
            f" links CUDA {version} dynamically, as its wheels do"
        ) from None
    pointer, size, text = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p
    for name, result, arguments in (
        ("cudaHostRegister", ctypes.c_int, (pointer, size, ctypes.c_uint)),
        ("cudaHostUnregister", ctypes.c_int, (pointer,)),
        ("cudaLaunchHostFunc", ctypes.c_int, (pointer, pointer, pointer)),
        ("cudaGetLastError", ctypes.c_int, ()),
        ("cudaGetErrorName", text, (ctypes.c_int,)),
        ("cudaGetErrorString", text, (ctypes.c_int,)),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def _locked_limit() -> str:
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return "unlimited" if limit == resource.RLIM_INFINITY else f"{limit // 1024} (KiB)"
