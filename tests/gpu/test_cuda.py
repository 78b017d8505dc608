"""Tests without CUDA the direct calls of the CUDA runtime, with a fake runtime."""

import ctypes
import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from mmap import PAGESIZE as PAGE
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lvllm import engine
from lvllm.engine import bank
from lvllm.gpu import cuda
from lvllm.gpu.cuda import CudaAccelerator
from lvllm.gpu.devices import open_accelerator

SONAME = "libcudart.so.99"
SOURCE = r"""
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <map>

extern "C" {
int next_code = 0;  // what the next call returns
int last_error = 0;
char calls[4096];   // one line a call

static int note(const char* line) {
  std::strcat(calls, line);
  last_error = next_code;
  return next_code;
}

std::map<size_t, size_t> registered;  // begin and end

int cudaHostRegister(void* memory, size_t size, unsigned flags) {
  char line[128];
  const size_t begin = (size_t)memory;
  std::snprintf(line, sizeof line, "register %zu %zu %u\n", begin, size, flags);
  if (next_code != 0) return note(line);
  for (const auto& [first, last] : registered) {
    if (first < begin + size && begin < last) return 712;  // AlreadyRegistered
  }
  for (size_t at = begin; at < begin + size; at += 4096) {  // CUDA takes what it may write
    volatile char* byte = (volatile char*)at;
    *byte = *byte;
  }
  registered[begin] = begin + size;
  return note(line);
}

int cudaHostUnregister(void* memory) {
  char line[128];
  std::snprintf(line, sizeof line, "unregister %zu\n", (size_t)memory);
  if (registered.erase((size_t)memory) == 0) return 713;  // NotRegistered
  return note(line);
}

int cudaLaunchHostFunc(void* stream, void (*function)(void*), void* argument) {
  char line[128];
  std::snprintf(line, sizeof line, "launch %zu %zu\n", (size_t)stream, (size_t)argument);
  function(argument);
  return note(line);
}

int cuStreamWriteValue64_v2(void*, size_t address, size_t value, unsigned flags) {
  if (flags != 0) return 1;
  *(volatile size_t*)address = value;
  return next_code;
}

int cuStreamWaitValue64_v2(void*, size_t address, size_t value, unsigned flags) {
  return flags == 1 && *(volatile size_t*)address == value ? next_code : 1;
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
    """The fake runtime, and the calls that it got."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._code = ctypes.c_int.in_dll(library, "next_code")
        self._last = ctypes.c_int.in_dll(library, "last_error")
        self._calls = (ctypes.c_char * 4096).in_dll(library, "calls")
        self.settled: list[torch.device] = []

    def fail_with(self, code: int) -> None:
        self._code.value = code

    @property
    def last_error(self) -> int:
        return self._last.value

    def calls(self) -> list[list[str]]:
        lines = self._calls.value.decode().splitlines()
        self._calls.value = b""
        return [line.split() for line in lines]


class Current:
    """Takes the place of torch.cuda.device, which sets the device of calls."""

    device: torch.device | None = None

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __enter__(self) -> None:
        Current.device = self._device

    def __exit__(self, *_: object) -> None:
        Current.device = None


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("cudart")
    (folder / "cudart.cpp").write_text(SOURCE)
    # The file has another name, since only the soname is looked for.
    command = [os.environ.get("CXX", "g++"), "-shared", "-fPIC", f"-Wl,-soname,{SONAME}"]
    subprocess.run([*command, "-o", "runtime.so", "cudart.cpp"], cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "runtime.so"))


@pytest.fixture
def fake(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    """Make PyTorch appear to be built for CUDA 99.1, with the fake runtime loaded."""
    runtime = Fake(library)
    monkeypatch.setattr(torch.version, "cuda", "99.1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", Current)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: runtime.settled.append(device))
    cuda.runtime.cache_clear()
    open_accelerator.cache_clear()
    runtime.calls()
    yield runtime
    runtime.fail_with(0)
    cuda.runtime.cache_clear()
    open_accelerator.cache_clear()


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


def test_words_of_a_stream(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda.driver.cache_clear()
    monkeypatch.setattr(cuda, "DRIVER", SONAME)  # The fake has the driver's functions, too.
    accelerator = CudaAccelerator()
    stream: Any = SimpleNamespace(cuda_stream=0)
    words = torch.zeros(2, dtype=torch.int64)
    accelerator.write_word(words.data_ptr() + 8, 1 << 40, stream)
    assert words.tolist() == [0, 1 << 40]
    accelerator.await_word(words.data_ptr() + 8, 1 << 40, stream)
    fake.fail_with(801)
    with pytest.raises(RuntimeError, match=r"^cuStreamWaitValue64_v2: CUDA's driver .* error 801$"):
        accelerator.await_word(words.data_ptr() + 8, 1 << 40, stream)
    cuda.driver.cache_clear()
    monkeypatch.setattr(cuda, "DRIVER", "libcuda.so.98")
    with pytest.raises(RuntimeError, match=r"^CUDA's driver cannot write words .*libcuda.so.98"):
        accelerator.write_word(words.data_ptr(), 0, stream)
    cuda.driver.cache_clear()


def pages(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the address of the tensor's first page, and the bytes of its pages."""
    begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    return begin // PAGE * PAGE, -(-end // PAGE) * PAGE - begin // PAGE * PAGE


def test_whole_pages_are_pinned_once_and_kept(fake: Fake) -> None:
    accelerator = CudaAccelerator()
    memory = torch.zeros(5 * PAGE, dtype=torch.uint8)
    first = -memory.data_ptr() % PAGE
    small, large = memory[first + 30 : first + 60], memory[first + 90 : first + 2 * PAGE]
    accelerator.pin(small)
    begin, size = pages(small)
    assert fake.calls() == [["register", str(begin), str(size), "0"]]
    assert fake.settled == []
    accelerator.pin(large)
    both, size_of_both = pages(large)
    assert both == begin
    assert fake.calls() == [
        ["unregister", str(begin)],
        ["register", str(begin), str(size_of_both), "0"],
    ]
    assert fake.settled == [accelerator.device]  # Copies of the first may be queued.
    address = memory.data_ptr()
    accelerator.unpin(large)
    assert fake.calls() == [
        ["unregister", str(begin)],
        ["register", str(begin), str(size), "0"],
    ]
    del memory, large
    (kept,) = accelerator._pinned._kept.values()
    assert kept[0].untyped_storage().data_ptr() == address
    accelerator.unpin(small)
    assert fake.calls() == [["unregister", str(begin)]]
    with pytest.raises(ValueError, match=r"^a tensor of 30 bytes was never pinned$"):
        accelerator.unpin(small)
    accelerator.pin(torch.zeros(0))
    accelerator.unpin(torch.zeros(0))
    with pytest.raises(ValueError, match=r"strides \(1, 5\), wanted a contiguous one"):
        accelerator.pin(torch.zeros(3, 5).T)
    assert not fake.calls()


def test_calls_are_made_on_the_device(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finaliser may run in a thread whose current device is another one."""
    accelerator = CudaAccelerator()
    seen: list[torch.device | None] = []

    class Runtime:
        def __getattr__(self, name: str) -> Any:
            return self._call

        @staticmethod
        def _call(*_: object) -> int:
            seen.append(Current.device)
            return 0

    monkeypatch.setattr(accelerator, "_runtime", Runtime())
    tensor = torch.zeros(3)
    accelerator.pin(tensor)
    accelerator.call(1, 2, SimpleNamespace(cuda_stream=0))  # type: ignore[arg-type]
    accelerator.unpin(tensor)
    assert seen == [accelerator.device] * 3


def test_memory_of_another_engine(fake: Fake) -> None:
    """It is mapped read-only. It is registered like other memory, and stays read-only."""
    engine.configure(shared=True)
    try:
        mine = bank.allocate((1, 5 * PAGE), torch.uint8)
        mine.fill_(3)
        place = bank.shared_place(mine)
        theirs = bank.map_shared(place[0], place[2])[: 3 * PAGE]
    finally:
        engine.configure()
    begin, end = theirs.data_ptr(), theirs.data_ptr() + theirs.nbytes
    assert cuda._read_only(begin, end)
    accelerator = CudaAccelerator()
    accelerator.pin(theirs)
    assert fake.calls() == [["register", str(begin), str(3 * PAGE), "0"]]
    assert cuda._read_only(begin, end)
    mine.fill_(4)
    assert (theirs == 4).all()
    accelerator.unpin(theirs)
    fake.fail_with(2)
    with pytest.raises(RuntimeError, match=r"^cannot pin 12288 bytes"):
        accelerator.pin(theirs)
    assert cuda._read_only(begin, end)
    assert not cuda._read_only(mine.data_ptr(), mine.data_ptr() + mine.nbytes)


@pytest.mark.parametrize(
    ("limit", "says"), [(resource.RLIM_INFINITY, "unlimited"), (8 << 20, "8192 (KiB)")]
)
def test_a_refusal_to_pin_is_one_line(
    fake: Fake, limit: int, says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limit, limit))
    accelerator, tensor = CudaAccelerator(), torch.zeros(3 << 20, dtype=torch.uint8)
    fake.fail_with(2)
    with pytest.raises(RuntimeError) as caught:
        accelerator.pin(tensor)
    assert str(caught.value) == (
        f"cannot pin {pages(tensor)[1]} bytes (0.00 GiB) of host memory for the GPU:"
        " cudaHostRegister: cudaErrorMemoryAllocation (2): out of memory;"
        f" `ulimit -l` is {says}; set it to unlimited (in Docker: --ulimit memlock=-1), or let the"
        " machine have more free memory"
    )
    assert not accelerator._pinned._kept
    assert fake.last_error == 0  # PyTorch does not blame its next kernel.
    (tmp_path / "version").write_text("Linux version 6.6.87.2-microsoft-standard-WSL2")
    monkeypatch.setattr(cuda, "KERNEL", tmp_path / "version")
    with pytest.raises(RuntimeError, match="free memory; Windows limits the memory that WSL 2 can"):
        accelerator.pin(tensor)


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
    """Each call reaches the right object, with the other one as its argument."""
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
