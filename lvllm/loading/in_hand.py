"""The checkpoint tensor that a model's loading code works on at the moment.

vLLM's own errors about a tensor, such as an assertion that two shapes are equal, do not name the
tensor. So the reader notes each tensor that it yields, and `FileTensor` notes itself each time an
operation or an attribute of it is used. A model may collect several tensors and load them later;
the one that was used last is then the one that an error is about.
"""

from lvllm.checkpoint.headers import TensorInfo

__all__ = ["clear", "note", "tensor"]

_tensor: TensorInfo | None = None


def note(info: TensorInfo) -> None:
    """Remember this tensor as the one in hand."""
    global _tensor
    _tensor = info


def clear() -> None:
    """Forget the tensor: no later error is about it."""
    global _tensor
    _tensor = None


def tensor() -> TensorInfo | None:
    """The tensor in hand, or None before and after loading."""
    return _tensor
