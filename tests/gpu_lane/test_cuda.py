"""What of CUDA can be tested without it: the calls that go past PyTorch, into a fake runtime."""

import ctypes
import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from lvllm.gpu import cuda
from lvllm.gpu.accelerator import open_accelerator
from lvllm.gpu.cuda import CudaAccelerator

SONAME = "libcudart.so.99"
SOURCE = r"""
#include <cstddef>
#include <cstdio>
#include <cstring>

extern "C" {
int next_code = 0;  // what the next call returns
int last_error = 0;
char calls[4096];   // one line a call

static int note(const char* line) {
  std::strcat(calls, line);
  last_error = next_code;
  return next_code;
}

int cudaHostRegister(void* memory, size_t size, unsigned flags) {
  char line[128];
  std::snprintf(line, sizeof line, "register %zu %zu %u\n", (size_t)memory, size, flags);
  return note(line);
}

int cudaHostUnregister(void* memory) {
  char line[128];
  std::snprintf(line, sizeof line, "unregister %zu\n", (size_t)memory);
  return note(line);
}

int cudaLaunchHostFunc(void* stream, void (*function)(void*), void* argument) {
  char line[128];
  std::snprintf(line, sizeof line, "launch %zu %zu\n", (size_t)stream, (size_t)argument);
  function(argument);
  return note(line);
}

int cudaGetLastError() {
  int code = last_error;
  last_error = 0;
  return code;
}

const char* cudaGetErrorName(int code) { return code == 2 ? "cudaErrorMemoryAllocation" : "?"; }
const char* cudaGetErrorString(int code) { return code == 2 ? "out of memory" : "??"; }
}
"""


class Fake:
    """The fake runtime, and what it was asked."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._code = ctypes.c_int.in_dll(library, "next_code")
        self._last = ctypes.c_int.in_dll(library, "last_error")
        self._calls = (ctypes.c_char * 4096).in_dll(library, "calls")

    def fail_with(self, code: int) -> None:
        self._code.value = code

    @property
    def last_error(self) -> int:
        return self._last.value

    def calls(self) -> list[list[str]]:
        lines = self._calls.value.decode().splitlines()
        self._calls.value = b""
        return [line.split() for line in lines]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("cudart")
    (folder / "cudart.cpp").write_text(SOURCE)
    # The file has another name: the soname alone is looked for.
    command = [os.environ.get("CXX", "g++"), "-shared", "-fPIC", f"-Wl,-soname,{SONAME}"]
    subprocess.run([*command, "-o", "runtime.so", "cudart.cpp"], cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "runtime.so"))


@pytest.fixture
def fake(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    """A PyTorch that was built for CUDA 99.1 and has loaded its runtime."""
    monkeypatch.setattr(torch.version, "cuda", "99.1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    cuda.runtime.cache_clear()
    runtime = Fake(library)
    runtime.calls()
    yield runtime
    runtime.fail_with(0)
    cuda.runtime.cache_clear()


def test_the_runtime_is_the_one_in_the_process(fake: Fake, library: ctypes.CDLL) -> None:
    assert cuda.runtime()._handle == library._handle
    accelerator = open_accelerator("cuda")
    assert (accelerator.name, accelerator.device) == ("cuda", torch.device("cuda", 0))


def test_no_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda.runtime.cache_clear()
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(RuntimeError, match=r"^PyTorch [^ ]* is not built for CUDA$"):
        cuda.runtime()
    monkeypatch.setattr(torch.version, "cuda", "98.0")
    with pytest.raises(
        RuntimeError, match=r"has not loaded libcudart.so.98: LvLLM needs a PyTorch"
    ):
        cuda.runtime()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"^accelerator cuda: PyTorch finds no CUDA device$"):
        open_accelerator("cuda")


def test_memory_is_pinned_once_and_kept(fake: Fake) -> None:
    accelerator = CudaAccelerator()
    tensor = torch.zeros(3, 5, dtype=torch.bfloat16)
    accelerator.pin(tensor)
    assert fake.calls() == [["register", str(tensor.data_ptr()), "30", "0"]]
    assert any(kept is tensor for kept in accelerator._registered.values())
    accelerator.unpin(tensor)
    assert fake.calls() == [["unregister", str(tensor.data_ptr())]]
    assert not accelerator._registered
    with pytest.raises(ValueError, match=r"^a tensor of 30 bytes was never pinned$"):
        accelerator.unpin(tensor)
    accelerator.pin(torch.zeros(0))
    accelerator.unpin(torch.zeros(0))
    with pytest.raises(ValueError, match=r"strides \(1, 5\), wanted a contiguous one"):
        accelerator.pin(tensor.T)
    assert not fake.calls()


@pytest.mark.parametrize(
    ("limit", "says"), [(resource.RLIM_INFINITY, "unlimited"), (8 << 20, "8192 (KiB)")]
)
def test_a_refusal_to_pin_is_one_line(
    fake: Fake, limit: int, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limit, limit))
    accelerator, tensor = CudaAccelerator(), torch.zeros(3 << 20, dtype=torch.uint8)
    fake.fail_with(2)
    with pytest.raises(RuntimeError) as caught:
        accelerator.pin(tensor)
    assert str(caught.value) == (
        "cannot pin 3145728 bytes (0.00 GiB) of host memory for the GPU: cudaHostRegister:"
        f" cudaErrorMemoryAllocation (2): out of memory; `ulimit -l` is {says}; set it to unlimited"
        " (in Docker: --ulimit memlock=-1), or let the machine have more free memory"
    )
    assert not accelerator._registered
    assert fake.last_error == 0  # PyTorch's next kernel does not take it for its own


def test_a_host_callback(fake: Fake) -> None:
    accelerator, stream = CudaAccelerator(), SimpleNamespace(cuda_stream=0x7F0012345678)
    seen: list[int] = []
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(seen.append)
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    accelerator.call(address, 0x7FFF12345678, stream)  # type: ignore[arg-type]
    assert fake.calls() == [["launch", str(0x7F0012345678), str(0x7FFF12345678)]]
    assert seen == [0x7FFF12345678]
    fake.fail_with(2)
    with pytest.raises(RuntimeError, match=r"^cudaLaunchHostFunc: cudaErrorMemoryAllocation \(2\)"):
        accelerator.call(address, 1, stream)  # type: ignore[arg-type]


def test_streams_and_events_are_pytorchs(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call reaches the object that it should, with the other as its argument."""
    seen: list[object] = []

    @contextmanager
    def within(stream: object) -> Iterator[None]:
        seen.append(("enter", stream))
        yield
        seen.append("leave")

    monkeypatch.setattr(torch.cuda, "stream", within)
    stream = SimpleNamespace(
        wait_event=lambda event: seen.append(("wait", event)),
        synchronize=lambda: seen.append("synchronize"),
    )
    event = SimpleNamespace(record=lambda on: seen.append(("record", on)), query=lambda: False)
    accelerator = CudaAccelerator()
    accelerator.record(event, stream)  # type: ignore[arg-type]
    accelerator.wait(event, stream)  # type: ignore[arg-type]
    accelerator.synchronize(stream)  # type: ignore[arg-type]
    assert not accelerator.reached(event)  # type: ignore[arg-type]
    source, target = torch.rand(3, 4), torch.zeros(3, 4)
    accelerator.copy(target, source, stream)  # type: ignore[arg-type]
    assert torch.equal(source, target)
    assert seen == [
        ("record", stream),
        ("wait", event),
        "synchronize",
        ("enter", stream),
        "leave",
    ]
    with pytest.raises(ValueError, match="cannot copy"):
        accelerator.copy(target, source.half(), stream)  # type: ignore[arg-type]


def test_a_full_device_is_one_line(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*shape: object, **options: object) -> torch.Tensor:
        assert options == {"dtype": torch.uint8, "device": torch.device("cuda", 0)}
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nand more")

    monkeypatch.setattr(torch, "empty", full)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 29, 80 << 30))
    with pytest.raises(MemoryError) as caught:
        CudaAccelerator().device_memory(3 << 30, None)  # type: ignore[arg-type]
    assert str(caught.value) == (
        "of the GPU's 80.00 GiB, 0.50 GiB are free, and 3.00 GiB were asked for"
    )
