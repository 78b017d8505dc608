"""CUDA, through PyTorch's streams and events.

PyTorch offers neither host callbacks nor the registration of memory that exists already. For these,
this module calls the CUDA runtime that PyTorch has loaded. Another copy of the runtime would know
neither PyTorch's streams nor its errors.
"""

import ctypes
import os
import resource
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from mmap import PROT_READ, PROT_WRITE
from pathlib import Path

import torch

from lvllm.gpu.accelerator import Accelerator, check_copy, check_pinnable
from lvllm.gpu.pinning import PinnedTensors
from lvllm.units import gib

__all__ = ["CudaAccelerator", "runtime"]

DRIVER = "libcuda.so.1"
KERNEL = Path("/proc/version")
WINDOWS = "; Windows limits the memory that WSL 2 can pin, so serve large models on Linux itself"
"""CUDA on WSL User Guide, known limitations: pinned system memory."""
WAIT_FOR_EQUAL = 1
"""CU_STREAM_WAIT_VALUE_EQ"""


class CudaAccelerator(Accelerator):
    """The process's current CUDA device."""

    name = "cuda"
    compiles = True

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise RuntimeError("accelerator cuda: PyTorch finds no CUDA device")
        self._runtime = runtime()
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._pinned = PinnedTensors(
            self._register,
            lambda address: self._check("cudaHostUnregister", address),
            lambda: torch.cuda.synchronize(self.device),
        )

    def compute(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.device)

    def stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.device)

    def within(self, stream: torch.cuda.Stream) -> AbstractContextManager[object]:
        return torch.cuda.stream(stream)

    def event(self) -> torch.cuda.Event:
        return torch.cuda.Event()

    def record(self, event: torch.cuda.Event, stream: torch.cuda.Stream) -> None:
        event.record(stream)

    def wait(self, event: torch.cuda.Event, stream: torch.cuda.Stream) -> None:
        stream.wait_event(event)

    def reached(self, event: torch.cuda.Event) -> bool:
        return event.query()

    def mark(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        mark = torch.cuda.Event(enable_timing=True)
        mark.record(stream)
        return mark

    def seconds(self, first: torch.cuda.Event, second: torch.cuda.Event) -> float | None:
        if not (first.query() and second.query()):
            return None
        return first.elapsed_time(second) / 1e3

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: torch.cuda.Stream) -> None:
        check_copy(target, source)
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)

    def call(self, function: int, argument: int, stream: torch.cuda.Stream) -> None:
        self._check("cudaLaunchHostFunc", stream.cuda_stream, function, argument)

    def write_word(self, address: int, value: int, stream: torch.cuda.Stream) -> None:
        # Without a flag, the write comes after what earlier work of the stream wrote.
        self._word("cuStreamWriteValue64_v2", address, value, stream, 0)

    def await_word(self, address: int, value: int, stream: torch.cuda.Stream) -> None:
        self._word("cuStreamWaitValue64_v2", address, value, stream, WAIT_FOR_EQUAL)

    def exchange(
        self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], stream: torch.cuda.Stream
    ) -> None:
        from lvllm.gpu.kernels import exchange

        for target, source in pairs:
            check_copy(target, source)
        with torch.cuda.stream(stream):
            exchange.run(pairs)

    def synchronize(self, stream: torch.cuda.Stream) -> None:
        stream.synchronize()

    def device_memory(self, size: int, stream: torch.cuda.Stream) -> torch.Tensor:
        try:
            memory = torch.empty(size, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError:
            free, total = torch.cuda.mem_get_info(self.device)
            raise MemoryError(
                f"of the GPU's {gib(total)}, {gib(free)} are free, and {gib(size)} were asked for"
            ) from None
        # PyTorch reuses dropped memory in the order of the stream that it was allocated in. This
        # makes it wait for the other stream, too.
        memory.record_stream(stream)
        return memory

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)

    def pin(self, tensor: torch.Tensor) -> None:
        check_pinnable(tensor)
        self._pinned.pin(tensor)

    def unpin(self, tensor: torch.Tensor) -> None:
        self._pinned.unpin(tensor)

    def _register(self, address: int, size: int) -> None:
        try:
            with _writable(address, size):
                # The flags are 0: with unified addressing all devices and contexts see the memory.
                self._check("cudaHostRegister", address, size, 0)
        except (RuntimeError, OSError) as error:
            raise RuntimeError(
                f"cannot pin {size} bytes ({gib(size)}) of host memory for the GPU:"
                f" {error}; `ulimit -l` is {_locked_limit()}; set it to unlimited (in Docker:"
                " --ulimit memlock=-1), or let the machine have more free memory"
                + (WINDOWS if "microsoft" in KERNEL.read_text().lower() else "")
            ) from None

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def _word(
        self, function: str, address: int, value: int, stream: torch.cuda.Stream, flags: int
    ) -> None:
        with torch.cuda.device(self.device):
            code = getattr(driver(), function)(stream.cuda_stream, address, value, flags)
        if code != 0:
            raise RuntimeError(f"{function}: CUDA's driver answers with error {code}")

    def _check(self, function: str, *arguments: int) -> None:
        """Call a function of the runtime.

        The accelerator's device is current meanwhile. In a thread that has not chosen a device,
        such as one that runs a finaliser, the runtime would take the first device and make a
        context there. The default stream, too, is that of the current device.

        Raises RuntimeError with CUDA's name and text of an error.
        """
        with torch.cuda.device(self.device):
            code = getattr(self._runtime, function)(*arguments)
        if code != 0:
            # The runtime keeps a thread's error until it is asked for. PyTorch would blame the next
            # kernel that it starts for it.
            self._runtime.cudaGetLastError()
            name = self._runtime.cudaGetErrorName(code).decode()
            text = self._runtime.cudaGetErrorString(code).decode()
            raise RuntimeError(f"{function}: {name} ({code}): {text}")


@cache
def runtime() -> ctypes.CDLL:
    """Return the CUDA runtime that PyTorch has loaded in this process.

    It is found by its soname, whatever file it came from.

    Raises RuntimeError if the process has no runtime of PyTorch's CUDA version.
    """
    version = torch.version.cuda
    if version is None:
        raise RuntimeError(f"PyTorch {torch.__version__} is not built for CUDA")
    soname = f"libcudart.so.{version.partition('.')[0]}"
    try:
        # RTLD_NOLOAD finds a library only if it is loaded already.
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


@cache
def driver() -> ctypes.CDLL:
    """Return CUDA's driver, which the runtime has loaded.

    Pinned memory has the same address on the device (unified addressing). Graphs hold only the
    second versions of these functions.

    Raises RuntimeError if the driver lacks the functions.
    """
    try:
        library = ctypes.CDLL(DRIVER)
        for name in ("cuStreamWriteValue64_v2", "cuStreamWaitValue64_v2"):
            getattr(library, name).argtypes = (
                ctypes.c_void_p,
                ctypes.c_uint64,
                ctypes.c_uint64,
                ctypes.c_uint,
            )
    except (OSError, AttributeError) as error:
        raise RuntimeError(f"CUDA's driver cannot write words in streams: {error}") from None
    return library


@contextmanager
def _writable(address: int, size: int) -> Iterator[None]:
    """Make read-only memory writable while the context is open. Another engine maps it read-only.

    CUDA registers pages that it may write. The flag for other pages, cudaHostRegisterReadOnly, does
    not work on every device. Only the mapping at the time of registration matters.
    """
    if not _read_only(address, address + size):
        yield
        return
    _protect(address, size, PROT_READ | PROT_WRITE)
    try:
        yield
    finally:
        _protect(address, size, PROT_READ)


def _read_only(begin: int, end: int) -> bool:
    """Tell whether this process cannot write some of these bytes."""
    with open("/proc/self/maps") as file:
        for line in file:
            addresses, access = line.split(maxsplit=2)[:2]
            first, last = (int(address, 16) for address in addresses.split("-"))
            if first < end and begin < last and access[1] != "w":
                return True
    return False


def _protect(address: int, size: int, access: int) -> None:
    mprotect = ctypes.CDLL(None, use_errno=True).mprotect
    mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    if mprotect(address, size, access) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"mprotect: {os.strerror(error)}")


def _locked_limit() -> str:
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return "unlimited" if limit == resource.RLIM_INFINITY else f"{limit // 1024} (KiB)"
