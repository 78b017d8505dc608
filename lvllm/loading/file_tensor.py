"""Tensors of a checkpoint that stay in their file until they are copied.

vLLM's loading code takes a `FileTensor` for any other tensor on the CPU: it slices, transposes and
copies it. Only a copy, or an operation that needs the values, reads bytes from the file.
"""

from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from lvllm.checkpoint.headers import TensorInfo
from lvllm.loading import in_hand
from lvllm.loading.blocks import BlockSource
from lvllm.loading.source import Fill, Source

__all__ = ["FileTensor"]


class FileTensor(torch.Tensor):
    """A tensor of a checkpoint, or a view of one, that is still in its file.

    Making a view reads nothing. `copy_` from it reads into the memory of the other tensor. Any
    other operation reads the bytes that it needs into memory of its own. An operation that writes
    to a FileTensor keeps the whole tensor in memory, where all its views see the change.
    """

    source: Source
    _view: torch.Tensor
    """On the meta device: the view's shape, strides and place in the whole tensor."""

    @classmethod
    def of(cls, info: TensorInfo, fill: Fill) -> "FileTensor":
        """The whole tensor, whose bytes `fill` reads from its file."""
        whole = torch.empty(info.shape, dtype=info.dtype, device="meta")
        source = Source if info.blocks is None else BlockSource
        return cls(source(info, fill), whole)

    @staticmethod
    def __new__(cls, source: Source, view: torch.Tensor) -> "FileTensor":
        made: FileTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            view.size(),
            strides=view.stride(),
            storage_offset=view.storage_offset(),
            dtype=view.dtype,
            device=torch.device("cpu"),
        )
        return made

    def __init__(self, source: Source, view: torch.Tensor) -> None:
        self.source = source
        self._view = view

    def in_memory(self) -> torch.Tensor:
        """A plain tensor of the same values and strides. Raises CheckpointError."""
        return self.source.read(self._view)

    def _as_source_of(self, to: torch.Tensor) -> "FileTensor":
        """This tensor, as it is copied into the memory of `to`.

        Raises CheckpointError if one is of integers and the other of floating-point numbers:
        PyTorch would turn 0.3 into the integer 0 without a warning. It also raises one for fewer
        numbers than `to` has, which PyTorch would repeat, for words of packed integers that are
        shorter than the 32 bits that they have, and for one 8-bit float in the place of another.
        """
        dtype, view = to.dtype, self._view
        if view.numel() < to.numel():
            raise self.source.info.refuse(
                f"is {list(view.size())}, the model takes {list(to.size())}"
            )
        if dtype == torch.uint8 and self.dtype == torch.float8_e8m0fnu:
            # The engine keeps exponents as bytes. Converted as a number, 2**-7 would become 0.
            return FileTensor(self.source, self._view.view(torch.uint8))
        alike = dtype.is_floating_point == self.dtype.is_floating_point
        if dtype == torch.int32:
            alike = alike and self.dtype.itemsize >= dtype.itemsize
        elif dtype.is_floating_point and dtype.itemsize == self.dtype.itemsize == 1:
            alike = dtype == self.dtype
        if not alike:
            stored, wanted = (str(of).removeprefix("torch.") for of in (self.dtype, dtype))
            raise self.source.info.refuse(f"is {stored}, the model takes {wanted}")
        return self

    # Without this, PyTorch would make a plain call of every attribute a call of Python code.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    # The following do not pass __torch_dispatch__.
    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """The size of each dimension. Loading code asks for it before it refuses a tensor."""
        in_hand.note(self.source.info)
        return super().size()

    def size(self, dim: int | None = None) -> Any:  # type: ignore[override]
        """All sizes, or that of one dimension."""
        return self.shape if dim is None else self.shape[dim]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        info = self.source.info
        return f"FileTensor({info.name!r}, {list(self.shape)}, {self.dtype}, file={info.file})"

    def numpy(self, **options: Any) -> Any:
        return self.in_memory().numpy(**options)

    def tolist(self) -> Any:
        return self.in_memory().tolist()

    def data_ptr(self) -> int:
        self.source.load()
        return self.in_memory().data_ptr()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for value in args:
            if isinstance(value, cls):
                in_hand.note(value.source.info)
        if func is torch.ops.aten.copy_.default:
            to, source = args[:2]
            if not isinstance(to, cls):
                source = source._as_source_of(to)
                if source.source.copy(source._view, to):
                    return to
                args = (to, source, *args[2:])
        if func.is_view and isinstance(args[0], cls):
            viewed = args[0]
            storage = viewed._view.untyped_storage()._cdata
            seen = func(viewed._view, *args[1:], **kwargs)
            views = [seen] if isinstance(seen, torch.Tensor) else seen
            # Some of these operations copy where a view is not possible.
            if all(view.untyped_storage()._cdata == storage for view in views):
                made = [cls(viewed.source, view) for view in views]
                return made[0] if isinstance(seen, torch.Tensor) else made
        if func._schema.is_mutable:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                written = argument.alias_info is not None and argument.alias_info.is_write
                if written and isinstance(value, cls):
                    value.source.load()
        args, kwargs = tree_map_only(cls, cls.in_memory, (args, kwargs))
        return func(*args, **kwargs)
