"""Runs a command on the emulated CUDA.

    python -m tests.gpu.emulated_cuda.run COMMAND ...

COMMAND's Python needs a PyTorch for CUDA 13, as from PyPI, and numpy below 2.4 for Triton's
interpreter. A compiler (g++) and the headers of CUDA in CUDA_HOME, /usr/local/cuda by default,
build the libraries into build/emulated-cuda. `vllm` must not be the overlay of this checkout for
CPUs, so use a fresh clone, whose `vllm` folder is empty, with vLLM for CUDA on PYTHONPATH. For
example:

    python -m tests.gpu.emulated_cuda.run python -m pytest tests/gpu/on_device/test_offload.py

EMULATED_CUDA_DEVICES is the number of devices (1). Each process has devices of its own, and they
send each other messages by an emulated NCCL (VLLM_ALLREDUCE_USE_SYMM_MEM=0 turns off what vLLM does
without NCCL). EMULATED_CUDA_GIB is a device's memory (4), of which what is written takes memory of
the host.
EMULATED_CUDA_LOG names a file for what is not computed and why captures are spoilt. With
EMULATED_CUDA_VALUES=0 Triton's kernels are compiled and started, and not computed, since the
interpreter is slow. Inductor's kernels are never computed: TORCHDYNAMO_DISABLE=1 does without them.
vLLM's attention is computed with attention_backend="TRITON_ATTN".
"""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
BUILD = ROOT / "build" / "emulated-cuda"
EXPORTED = "libcudart.so.13 { global: cuda*; __cuda*; emulated*; _ZN8emulated*; local: *; };\n"
"""PyTorch asks for the runtime's functions with this version."""
LIBRARIES: dict[str, tuple[str, ...]] = {
    "libcudart.so.13": ("memory.cpp", "streams.cpp", "kernels.cpp", "properties.cpp"),
    "libcuda.so.1": ("driver.cpp",),
    "libnvidia-ml.so.1": ("nvml.cpp",),
    "libnccl.so.2": ("nccl.cpp",),
}
"""The sources of each library. The first one is linked by the others."""
ENTRY = "[torch.backends]\nemulated = tests.gpu.emulated_cuda.operations:load\n"
"""PyTorch calls this when it is imported."""


def build() -> None:
    """Compile the libraries whose sources have changed. Raises CalledProcessError."""
    BUILD.mkdir(parents=True, exist_ok=True)
    exported = BUILD / "exported"
    exported.write_text(EXPORTED)
    includes = [f"-I{ROOT}", f"-I{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/include"]
    first, *_ = LIBRARIES
    for name, sources in LIBRARIES.items():
        library, paths = BUILD / name, [HERE / source for source in sources]
        newest = max(path.stat().st_mtime for path in [*paths, HERE / "device.h"])
        if library.exists() and library.stat().st_mtime > newest:
            continue
        options = [f"-L{BUILD}", f"-l:{first}"]
        if name == first:
            options = [f"-Wl,--version-script={exported}"]
        options += ["-o", str(library), f"-Wl,-soname,{name}", "-ldl"]
        compiler = ["g++", "-std=c++20", "-O1", "-g", "-fPIC", "-shared", "-Wall", *includes]
        subprocess.run([*compiler, *map(str, paths), *options], check=True)


def environment() -> dict[str, str]:
    """Return the environment in which CUDA is the emulated one."""
    info = BUILD / "site" / "emulated_cuda-1.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: emulated-cuda\nVersion: 1\n")
    (info / "entry_points.txt").write_text(ENTRY)
    paths = [os.environ.get("PYTHONPATH"), str(info.parent), str(ROOT)]
    messages = BUILD / "messages"
    messages.mkdir(exist_ok=True)
    return os.environ | {
        "EMULATED_CUDA_MESSAGES": str(messages),
        "LD_PRELOAD": f"{BUILD / 'libcudart.so.13'} {BUILD / 'libnccl.so.2'}",
        "LD_LIBRARY_PATH": str(BUILD),
        "TRITON_LIBCUDA_PATH": str(BUILD),
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }


def main() -> None:
    command = sys.argv[1:]
    if not command:
        raise SystemExit("wanted a command, for example: python -m pytest FILE")
    build()
    os.execvpe(command[0], command, environment())


if __name__ == "__main__":
    main()
