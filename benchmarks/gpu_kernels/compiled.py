"""Compiles the kernels of experts without a GPU, for any architecture that Triton knows."""

import re
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from tempfile import NamedTemporaryFile
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

__all__ = ["SHARED_KIB", "Launch", "Resources", "compile_launch", "recorded"]

SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""The KiB of shared memory that a block may take on each architecture (CUDA C++ Programming Guide,
table of technical specifications per compute capability)."""
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.int16: "*i16",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Launch:
    """One start of a kernel, with all its arguments by name."""

    kernel: JITFunction[Any]
    arguments: Mapping[str, Any]
    options: Mapping[str, Any]
    """`num_warps` and such."""


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes."""

    registers: int
    """Of each thread."""
    spilled: int
    """Bytes of each thread's registers that are stored to memory and loaded again."""
    shared: int
    """Bytes of each block."""


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collect the kernels that are started meanwhile, and start none of them."""
    launches: list[Launch] = []

    def run(kernel: JITFunction[Any], *values: Any, grid: Any, warmup: bool, **named: Any) -> None:
        arguments = dict(zip(kernel.arg_names, values, strict=False))
        arguments |= {name: named.pop(name) for name in kernel.arg_names if name in named}
        assert set(arguments) == set(kernel.arg_names)
        launches.append(Launch(kernel, arguments, named))

    with mock.patch.object(JITFunction, "run", run):
        yield launches


def compile_launch(launch: Launch, architecture: int) -> Resources:
    """Compile a kernel as Triton does for this launch on a GPU of `architecture`, such as 90."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        tensor, special = isinstance(value, torch.Tensor), not parameter.do_not_specialize
        if parameter.is_constexpr or (not tensor and special and value == 1):
            signature[name], constants[(index,)] = "constexpr", value
            continue
        signature[name] = _type(value)
        if special and (tensor or (isinstance(value, int) and value % 16 == 0)):
            attributes[(index,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(launch.kernel, signature, constants, attributes),
        target=GPUTarget("cuda", architecture, 32),
        options=dict(launch.options),
    )
    registers, spilled = _assembled(compiled.asm["ptx"], architecture)
    return Resources(registers, spilled, compiled.metadata.shared)


def _type(value: Any) -> str:
    """Return the type of an argument as Triton writes it."""
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def _assembled(ptx: str, architecture: int) -> tuple[int, int]:
    """Return the registers of a thread and its spilled bytes, which the assembler reports."""
    target = re.search(r"\.target (sm_\w+)", ptx)
    assert target
    with NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(architecture).path, "-v", f"--gpu-name={target[1]}", file.name]
        done = subprocess.run(
            [*command, "-o", "/dev/null"], capture_output=True, text=True, check=True
        )
    registers = re.search(r"Used (\d+) registers", done.stderr)
    spilled = re.search(r"(\d+) bytes spill stores", done.stderr)
    assert registers, done.stderr
    assert spilled, done.stderr
    return int(registers[1]), int(spilled[1])
