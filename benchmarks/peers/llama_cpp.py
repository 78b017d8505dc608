"""llama.cpp: its library ggml, as llama-cpp-python builds it for this CPU.

The graph is that of llama.cpp's MoE layers (`ggml_mul_mat_id`, SwiGLU, weighted sum), with gate and
up in one matrix. Weights of 4 bits and of Q2_K lie in ggml's repacked buffer. The scales of int8 go
into blocks of 32, which makes its weights 6% larger.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
from ctypes import POINTER, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Batch
from benchmarks.peers.settings import Refused, Settings
from benchmarks.weights import GROUP_SIZE, RandomWeights

PACKAGE = "llama-cpp-python"
F32, I32 = 0, 26
# ggml's number of the type, and whether x86 has a repacked order for it.
TYPES = {
    "bf16": (30, False),
    "fp16": (1, False),
    "int8": (8, False),  # Q8_0
    "int4": (2, True),  # Q4_0
    "mxfp4": (39, True),
    "q2_k": (10, True),
    "q3_k": (11, False),
    "q4_k": (12, True),
    "q5_k": (13, False),
    "q6_k": (14, False),
    "q4_1": (3, False),
    "q5_0": (6, False),
    "q5_1": (7, False),
    "iq4_nl": (20, True),
    "iq4_xs": (23, False),
    "iq1_s": (19, False),
    "iq1_m": (29, False),
    "iq2_xxs": (16, False),
    "iq2_xs": (17, False),
    "iq2_s": (22, False),
    "iq3_xxs": (18, False),
    "iq3_s": (21, False),
}
FORMATS = tuple(TYPES)
BLOCK = 32
GRAPH_NODES = 256


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


ARGUMENTS: dict[str, list[Any]] = {
    "ggml_init": [_InitParams],
    "ggml_new_tensor_2d": [c_void_p, c_int, c_int64, c_int64],
    "ggml_new_tensor_3d": [c_void_p, c_int, c_int64, c_int64, c_int64],
    "ggml_mul_mat_id": [c_void_p] * 4,
    "ggml_swiglu": [c_void_p] * 2,
    "ggml_mul": [c_void_p] * 3,
    "ggml_add": [c_void_p] * 3,
    "ggml_view_2d": [c_void_p, c_void_p, c_int64, c_int64, c_size_t, c_size_t],
    "ggml_new_graph_custom": [c_void_p, c_size_t, c_bool],
    "ggml_build_forward_expand": [c_void_p] * 2,
    "ggml_set_input": [c_void_p],
    "ggml_set_output": [c_void_p],
    "ggml_backend_cpu_init": [],
    "ggml_backend_cpu_set_n_threads": [c_void_p, c_int],
    "ggml_backend_cpu_reg": [],
    "ggml_backend_reg_dev_get": [c_void_p, c_size_t],
    "ggml_backend_reg_get_proc_address": [c_void_p, c_char_p],
    "ggml_backend_buft_name": [c_void_p],
    "ggml_backend_get_default_buffer_type": [c_void_p],
    "ggml_backend_alloc_ctx_tensors_from_buft": [c_void_p] * 2,
    "ggml_backend_buffer_free": [c_void_p],
    "ggml_backend_tensor_set": [c_void_p, c_void_p, c_size_t, c_size_t],
    "ggml_backend_tensor_get": [c_void_p, c_void_p, c_size_t, c_size_t],
    "ggml_backend_graph_compute": [c_void_p] * 2,
    "ggml_gallocr_new": [c_void_p],
    "ggml_gallocr_alloc_graph": [c_void_p] * 2,
    "ggml_gallocr_free": [c_void_p],
    "ggml_free": [c_void_p],
}


def _folder() -> Path:
    """Where the libraries are: in llama_cpp/lib, unless GGML_LIBRARY_DIR names another folder."""
    if folder := os.environ.get("GGML_LIBRARY_DIR"):
        return Path(folder)
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise ImportError("no package llama_cpp")
    return Path(spec.origin).parent / "lib"


def library(name: str) -> ctypes.CDLL:
    """One of ggml's libraries. Raises ImportError."""
    path = _folder() / name
    if not path.exists():
        raise ImportError(f"no {path}")
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


class _Ggml:
    """The functions of ggml and its CPU backend; each pointer is an integer."""

    def __init__(self) -> None:
        libraries = [library(name) for name in ("libggml-base.so", "libggml-cpu.so")]
        for name, arguments in ARGUMENTS.items():
            function = next(getattr(lib, name) for lib in libraries if hasattr(lib, name))
            function.argtypes, function.restype = arguments, c_void_p
            setattr(self, name.removeprefix("ggml_"), function)

    def __getattr__(self, name: str) -> Any:  # for type checkers
        raise AttributeError(name)

    def repack_buffer_type(self) -> int:
        registry = self.backend_cpu_reg()
        address = self.backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        extra = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)
        types = extra(self.backend_reg_dev_get(registry, 0))
        index = 0
        while types[index]:
            if ctypes.string_at(self.backend_buft_name(types[index])) == b"CPU_REPACK":
                return int(types[index])
            index += 1
        raise Refused("this build of ggml has no repacked weights")


_loaded: list[_Ggml] = []


def _ggml() -> _Ggml:
    if not _loaded:
        _loaded.append(_Ggml())
    return _loaded[0]


def version() -> str:
    _ggml()
    try:
        return importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _blocks(weights: RandomWeights, tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """The bytes of a GGUF tensor: for each 32 weights along K a scale, then the values."""
    weight = tensors.pop(name)
    scale = tensors.pop(name + "_scale", None)
    if scale is None:
        return weight
    groups = scale.numel() if weights.format != "int8" else weight.numel() // BLOCK
    if weights.format == "int8":
        values = weight.view(torch.uint8).view(groups, BLOCK)
        scale = scale.repeat_interleave(weight.shape[2] // BLOCK)
    else:
        # Ours pairs neighbours in a byte; ggml pairs element i with element i + 16.
        low, high = (part.view(groups, 2, BLOCK // 4) for part in (weight & 15, weight >> 4))
        pairs = torch.stack((low, high), dim=-1).flatten(2)
        values = pairs[:, 0] | (pairs[:, 1] << 4)
    if scale.dtype != torch.uint8:
        scale = scale.to(torch.float16).view(-1, 1).view(torch.uint8)
    return torch.cat((scale.reshape(groups, -1), values), dim=1)


class Layer:
    def __init__(self, weights: RandomWeights, settings: Settings) -> None:
        self._ggml = ggml = _ggml()
        shape = self._shape = weights.shape
        kind, repacked = TYPES[weights.format]
        self._backend = ggml.backend_cpu_init()
        ggml.backend_cpu_set_n_threads(self._backend, settings.threads)
        self._default = ggml.backend_get_default_buffer_type(self._backend)
        self._context = ggml.init(_InitParams(1 << 16, None, True))
        rows = ((shape.hidden, 2 * shape.intermediate), (shape.intermediate, shape.hidden))
        self._matrices = [
            ggml.new_tensor_3d(self._context, kind, columns, rows, shape.experts)
            for columns, rows in rows
        ]
        place = ggml.repack_buffer_type() if repacked else self._default
        self._buffer = ggml.backend_alloc_ctx_tensors_from_buft(self._context, place)
        tensors = weights.tensors()
        for matrix, name in zip(self._matrices, ("w13", "w2"), strict=True):
            data = _blocks(weights, tensors, name)
            ggml.backend_tensor_set(matrix, data.data_ptr(), 0, data.nbytes)
        self._graphs: dict[int, Graph] = {}

    def __del__(self) -> None:
        self._graphs.clear()
        self._ggml.backend_buffer_free(self._buffer)
        self._ggml.free(self._context)

    def __call__(self, batch: Batch) -> torch.Tensor:
        tokens = batch.x.shape[0]
        if tokens not in self._graphs:
            if len(self._graphs) > 1:  # the batch's and the one of a single token
                self._graphs.pop(max(self._graphs))
            self._graphs[tokens] = Graph(
                self._ggml, self._shape, self._matrices, self._backend, self._default, tokens
            )
        return self._graphs[tokens](batch)


class Graph:
    def __init__(
        self,
        ggml: _Ggml,
        shape: Any,
        matrices: list[int],
        backend: int,
        buffer_type: int,
        tokens: int,
    ) -> None:
        self._ggml, self._backend = ggml, backend
        self._context = context = ggml.init(_InitParams(1 << 20, None, True))
        self._x = ggml.new_tensor_3d(context, F32, shape.hidden, 1, tokens)
        self._ids = ggml.new_tensor_2d(context, I32, shape.topk, tokens)
        self._weights = ggml.new_tensor_3d(context, F32, 1, shape.topk, tokens)
        for tensor in (self._x, self._ids, self._weights):
            ggml.set_input(tensor)
        hidden = ggml.mul_mat_id(context, matrices[0], self._x, self._ids)
        activated = ggml.swiglu(context, hidden)
        down = ggml.mul_mat_id(context, matrices[1], activated, self._ids)
        weighted = ggml.mul(context, down, self._weights)
        row = shape.hidden * 4
        parts = [
            ggml.view_2d(context, weighted, shape.hidden, tokens, row * shape.topk, slot * row)
            for slot in range(shape.topk)
        ]
        self._out = parts[0]
        for part in parts[1:]:
            self._out = ggml.add(context, self._out, part)
        ggml.set_output(self._out)
        self._graph = ggml.new_graph_custom(context, GRAPH_NODES, False)
        ggml.build_forward_expand(self._graph, self._out)
        self._memory = ggml.gallocr_new(buffer_type)
        ggml.gallocr_alloc_graph(self._memory, self._graph)

    def __del__(self) -> None:
        self._ggml.gallocr_free(self._memory)
        self._ggml.free(self._context)

    def __call__(self, batch: Batch) -> torch.Tensor:
        x = batch.x.float()
        for tensor, data in ((self._x, x), (self._ids, batch.ids), (self._weights, batch.weights)):
            self._ggml.backend_tensor_set(tensor, data.data_ptr(), 0, data.nbytes)
        self._ggml.backend_graph_compute(self._backend, self._graph)
        out = torch.empty_like(x)
        self._ggml.backend_tensor_get(self._out, out.data_ptr(), 0, out.nbytes)
        return out.to(batch.x.dtype)


def prepare(weights: RandomWeights, settings: Settings) -> Layer:
    shape = weights.shape
    if shape.hidden % BLOCK != 0 or shape.intermediate % BLOCK != 0:
        raise Refused(f"wants hidden and intermediate sizes divisible by {BLOCK}")
    assert GROUP_SIZE == BLOCK
    return Layer(weights, settings)


def run(layer: Layer, batch: Batch) -> torch.Tensor:
    return layer(batch)
