"""Computes PyTorch's operations for CUDA on the host's view of the device's memory.

In a capture, an operation is only recorded. Its result has memory and a shape then, and values
after a replay.
"""

import ctypes
import functools
import os
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map

from tests.gpu.emulated_cuda import hooks

__all__ = ["enqueue", "host_view", "is_on_device", "load", "runtime", "to_host"]

KEPT = {
    "alias", "as_strided", "empty.memory_format", "empty_strided", "is_pinned", "is_set_to",
    "record_stream", "resize_", "set_", "set_.source_Storage",
    "set_.source_Storage_storage_offset", "set_.source_Tensor", "unfold", "view", "view_as_complex",
    "view_as_real", "_has_compatible_shallow_copy_type", "_local_scalar_dense", "_pin_memory",
    "_reshape_alias",
}  # fmt: skip
"""Operations without a kernel, which PyTorch does by itself."""
WAITS = {
    "aten::_unique2", "aten::bincount", "aten::equal", "aten::masked_select", "aten::nonzero",
    "aten::unique_consecutive", "aten::unique_dim",
}  # fmt: skip
"""Operations for which the host waits, since it wants to know something of their result."""
WIDER = (torch.ops.aten.mm.dtype, torch.ops.aten.bmm.dtype)
"""Products with a dtype of their own, which PyTorch has for CUDA only."""
WORK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

_captured: list[Any] = []
"""What graphs do. They may be replayed for as long as the process lives."""
_library: torch.library.Library | None = None


def load() -> None:
    """Replace PyTorch's kernels for CUDA, if this process has the emulated runtime."""
    global _library
    if not hasattr(ctypes.CDLL(None), "emulated_enqueue"):
        return
    _library = torch.library.Library("aten", "IMPL")
    for name in torch._C._dispatch_get_registrations_for_dispatch_key("CUDA"):
        namespace, _, short = name.partition("::")
        if namespace != "aten" or short in KEPT or short == "copy_":
            continue
        base, _, overload = short.partition(".")
        operation = getattr(getattr(torch.ops.aten, base, None), overload or "default", None)
        if operation is not None:
            _library.impl(short, _computed(operation), "CUDA", allow_override=True)
    _library.impl("copy_", _copy, "CUDA", allow_override=True)
    hooks.install()


@functools.cache
def runtime() -> ctypes.CDLL:
    """Return the emulated runtime."""
    library = ctypes.CDLL(None)
    library.emulated_host_view.restype = ctypes.c_void_p
    library.emulated_enqueue.argtypes = [ctypes.c_void_p, WORK, ctypes.c_void_p]
    return library


def is_on_device(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_cuda


def host_view(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor on the CPU with the memory of one on the device."""
    storage = tensor.untyped_storage()
    if (size := storage.nbytes()) == 0:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    place = runtime().emulated_host_view(ctypes.c_void_p(storage.data_ptr()))
    whole = torch.frombuffer((ctypes.c_uint8 * size).from_address(place), dtype=torch.uint8)
    return torch.empty(0, dtype=tensor.dtype).set_(
        whole.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
    )


def to_host(value: Any) -> Any:
    """Return an argument as an operation on the CPU wants it."""
    if is_on_device(value):
        return host_view(value)
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    return None if isinstance(value, torch.Generator) else value


def enqueue(work: Callable[[], None]) -> None:
    """Do this in the current stream: now, or at each replay of the graph that is captured."""
    if not torch.cuda.is_current_stream_capturing():
        work()
        return

    def call(_: Any) -> None:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(99)

    function = WORK(call)
    _captured.append(function)
    stream = torch.cuda.current_stream().cuda_stream
    if code := runtime().emulated_enqueue(stream, function, None):
        raise RuntimeError(f"CUDA error {code} while a kernel was captured")


def _computed(operation: Any) -> Callable[..., Any]:
    schema = operation._schema

    def run(*args: Any, **kwargs: Any) -> Any:
        if schema.name in WAITS or _has_mask(args):
            torch.cuda.current_stream().synchronize()
        call = _Call(operation, args, kwargs)
        capturing = torch.cuda.is_current_stream_capturing()
        if not schema.is_mutable:
            return call.record_result() if capturing else call.result()
        return call.record_change() if capturing else call.change()

    return run


class _Call:
    """An operation with its arguments, on the device and on the host."""

    def __init__(self, operation: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        self._operation = operation
        declared = operation._schema.arguments
        # PyTorch passes a number that stands for a tensor as a number.
        self._args = tuple(
            torch.tensor(value)
            if isinstance(value, (bool, int, float)) and str(one.type) == "Tensor"
            else value
            for value, one in zip(args, declared, strict=False)
        )
        self._kwargs = kwargs
        names = {one.name: value for value, one in zip(self._args, declared, strict=False)} | kwargs
        self._changed = [
            names[one.name] for one in declared if one.alias_info and one.alias_info.is_write
        ]
        self._look()

    def _look(self) -> None:
        """Take the host's views of all arguments."""
        self._views: list[tuple[torch.Tensor, torch.Tensor]] = []

        def view(value: Any) -> Any:
            made = to_host(value)
            if is_on_device(value):
                self._views.append((made, value))
            return made

        self._on_host = tree_map(view, self._args), tree_map(view, self._kwargs)
        if self._on_host[1].get("pin_memory"):
            self._on_host[1]["pin_memory"] = False

    def _compute(self) -> Any:
        args, kwargs = self._on_host
        return self._operate(*args, **kwargs)

    def _operate(self, *args: Any, **kwargs: Any) -> Any:
        if self._operation not in WIDER:
            return self._operation(*args, **kwargs)
        first, second, dtype = args
        product: Any = self._operation.overloadpacket.default
        return product(first.to(dtype), second.to(dtype))

    def change(self) -> Any:
        """Compute an operation that changes some of its arguments."""
        result = self._compute()
        self._resize()
        return tree_map(self._given_or_new, result)

    def record_change(self) -> Any:
        if any(is_on_device(one) and one.numel() == 0 for one in self._changed):
            self._compute()  # The operation gives its result's tensor a size.
            self._resize()
            self._look()
        enqueue(self._compute)
        returns = len(self._operation._schema.returns)
        return self._changed[0] if returns == 1 else tuple(self._changed) if returns else None

    def _resize(self) -> None:
        for view, tensor in self._views:
            if view.shape != tensor.shape:
                tensor.resize_(view.shape)
                if view.numel():
                    host_view(tensor).copy_(view)

    def _given_or_new(self, value: Any) -> Any:
        """Return the argument whose view this is, or a copy of this on the device."""
        if not isinstance(value, torch.Tensor):
            return value
        for view, tensor in self._views:
            if value is view:
                return tensor
        place = _like(value, "cuda")
        if value.numel():
            host_view(place).copy_(value)
        return place

    def result(self) -> Any:
        """Compute an operation that changes nothing."""
        return tree_map(self._given_or_new, self._compute())

    def record_result(self) -> Any:
        places: list[torch.Tensor] = []

        def place(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            made = _like(value, "cuda")
            places.append(host_view(made))
            return made

        def again() -> None:
            found: list[torch.Tensor] = []
            tree_map(
                lambda one: found.append(one) if isinstance(one, torch.Tensor) else None,
                self._compute(),
            )
            for to, value in zip(places, found, strict=True):
                to.copy_(value)

        made = tree_map(place, self._shapes())
        enqueue(again)
        return made

    def _shapes(self) -> Any:
        """Return the result without values."""

        def shape(value: Any) -> Any:
            if isinstance(value, torch.device):
                return torch.device("meta")
            return _like(value, "meta") if isinstance(value, torch.Tensor) else value

        args, kwargs = tree_map(shape, self._on_host[0]), tree_map(shape, self._on_host[1])
        try:
            return self._operate(*args, **kwargs)
        except NotImplementedError:
            return self._compute()


def _like(tensor: torch.Tensor, device: str) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


def _has_mask(args: Sequence[Any]) -> bool:
    """Tell whether an argument is a list of indices with a mask, whose size the host wants."""
    return any(
        isinstance(one, torch.Tensor) and one.dtype in (torch.bool, torch.uint8)
        for value in args
        if isinstance(value, (list, tuple))
        for one in value
    )


def _copy(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    if not non_blocking and not (is_on_device(target) and is_on_device(source)):
        torch.cuda.current_stream().synchronize()
    to, value = to_host(target), to_host(source)
    if to.numel():
        enqueue(lambda: to.copy_(value))
    return target
