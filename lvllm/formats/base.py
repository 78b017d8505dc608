"""What every checkpoint format has in common."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Module, Parameter

from lvllm.engine import bank

__all__ = [
    "ExpertFormat",
    "Shape",
    "add_biases",
    "add_parameter",
    "add_weights",
    "check_scales",
    "empty",
    "narrow",
    "place_whole",
    "stored_shape",
    "wrong_shape",
]


@dataclass(frozen=True)
class Shape:
    """The routed experts of one layer, as this process holds them."""

    experts: int
    hidden: int
    intermediate: int
    parts: int
    """Projections in w13: 2 for gate and up, 1 for activations without a gate."""
    allocate: Callable[..., torch.Tensor] = bank.allocate
    """Makes the tensors that weights are loaded into; it takes the arguments of `bank.allocate`."""

    @property
    def matrices(self) -> tuple[tuple[str, int, int, int], ...]:
        """(name, parts, rows, columns) of an expert's w13 and w2."""
        return (
            ("w13", self.parts, self.parts * self.intermediate, self.hidden),
            ("w2", 1, self.hidden, self.intermediate),
        )


class ExpertFormat:
    """How the experts of one layer are stored in its checkpoint."""

    bits: int
    """Bits of a weight, without its share of the scales."""
    computable = True
    """Whether the engine computes the weights as they are stored. If not, `tensors` may return more
    than the arguments of `ExpertLayer` (`lvllm.engine.dequantize` says what), and in memory of its
    own. `lvllm.moe.converted` then converts them, or moves them to engine memory.
    """
    arrives = True
    """Whether the model calls a parameter's loader for every tensor, so that they are counted."""

    def create_weights(
        self, layer: Module, shape: Shape, dtype: torch.dtype, attributes: dict[str, Any]
    ) -> None:
        """Register the layer's parameters, for vLLM's loader to fill.

        A parameter's name is w13_SUFFIX or w2_SUFFIX, where SUFFIX is what the checkpoint calls the
        tensor. Weights are made by `shape.allocate`. Scales begin as NaN, which tells of those that
        never came. `dtype` is the model's. `attributes` are what vLLM's loader looks for on a
        parameter; one that a checkpoint may leave out gets the attribute `optional`, and scales get
        `quant_method`: "tensor", "channel", "group" or "block", which is what they are for.

        Raises ValueError for a `shape` that this process cannot hold in the format.
        """
        raise NotImplementedError

    def tensors(self, layer: Any) -> dict[str, Any]:
        """The arguments of `ExpertLayer` that hold the weights, called after loading.

        The weights are the parameters' own memory, not a second copy.

        Raises ValueError for scales that are missing, NaN or infinite.
        """
        raise NotImplementedError


def add_parameter(
    layer: Module, name: str, data: torch.Tensor, attributes: dict[str, Any], **more: Any
) -> None:
    """Register `data` as a parameter with these attributes."""
    parameter = Parameter(data, requires_grad=False)
    for key, value in (attributes | more).items():
        setattr(parameter, key, value)
    layer.register_parameter(name, parameter)


def add_weights(
    layer: Module,
    shape: Shape,
    suffix: str,
    dtype: torch.dtype,
    attributes: dict[str, Any],
    *,
    packed: int = 1,
    loaded_as: torch.dtype | None = None,
) -> None:
    """Register w13_SUFFIX and w2_SUFFIX [E, rows, columns / packed] in engine memory.

    The parameters are views of the dtype `loaded_as`, if the checkpoint's is another one.
    """
    for name, parts, rows, columns in shape.matrices:
        memory = shape.allocate((shape.experts, rows, columns // packed), dtype, parts=parts)
        add_parameter(layer, f"{name}_{suffix}", memory.view(loaded_as or dtype), attributes)


def add_biases(layer: Module, shape: Shape, dtype: torch.dtype, attributes: dict[str, Any]) -> None:
    """Register w13_bias [E, rows] and w2_bias [E, H], which all formats store alike."""
    for name, _, rows, _ in shape.matrices:
        bias = torch.full((shape.experts, rows), torch.nan, dtype=dtype)
        add_parameter(layer, f"{name}_bias", bias, attributes)


def empty(parameters: Iterable[Parameter]) -> None:
    """Free the parameters' memory, except that of optional ones, which may still be loaded."""
    for parameter in parameters:
        if not getattr(parameter, "optional", False):
            parameter.data = torch.empty(0, dtype=parameter.dtype)


def check_scales(layer: Any, suffix: str) -> tuple[torch.Tensor, torch.Tensor]:
    """w13_SUFFIX and w2_SUFFIX of a layer; ValueError if one is missing, NaN or infinite."""
    found = []
    for name in (f"w13_{suffix}", f"w2_{suffix}"):
        data = getattr(layer, name).data
        bad = data == 255 if data.dtype == torch.uint8 else ~torch.isfinite(data.float())
        if bad.any():
            expert = int(bad.view(len(bad), -1).any(1).nonzero()[0])
            raise ValueError(
                f"{layer.layer_name}: {name} of expert {expert} (of those in this process) is"
                " missing from the checkpoint, or holds NaN or infinity"
            )
        found.append(data)
    return found[0], found[1]


def stored_shape(parameter: Any, shard: str, parts: int, ranks: int) -> tuple[int, ...]:
    """The shape that a checkpoint's tensor of one projection of one expert must have.

    vLLM's loader gives each of the `ranks` of tensor parallelism its share of the rows of gate and
    up ("w1" and "w3", of which w13 has `parts`) and of the columns of down ("w2"). Biases of down
    and what it has for each row are not divided.

    Args:
        parameter: what the tensor is loaded into, [E, ...] for the experts of this process. Its
            attributes say what it is for (`ExpertFormat.create_weights`).
        shard: "w1", "w2" or "w3".
    """
    how = getattr(parameter, "quant_method", None)
    if how == "tensor":
        return ()
    size = list(parameter.shape[1:])
    of_down = shard == "w2"
    if of_down and (how == "channel" or len(size) == 1):
        return tuple(size)
    divided = int(of_down != getattr(parameter, "is_transposed", False))
    size[divided] *= ranks
    if not of_down:
        size[divided] //= parts
    return tuple(size)


def wrong_shape(found: Sequence[int], wanted: Sequence[int]) -> str:
    """The fault of a tensor, or of a projection's part of it, that has another shape."""
    return f"does not fit the model: has {list(found)} where the model takes {list(wanted)}"


def place_whole(data: torch.Tensor, expert: int, loaded: torch.Tensor, shard: str) -> None:
    """The attribute `place` of a parameter that takes all of a tensor in every process."""
    to = data[expert]
    if loaded.shape != to.shape:
        raise ValueError(wrong_shape(loaded.shape, to.shape))
    to.copy_(loaded)


def narrow(scale: torch.Tensor) -> torch.Tensor:
    """float32 scales in the 16 bits that they came from, where that loses nothing.

    Checkpoints have bfloat16 or float16 scales, whatever dtype the model is run in.
    """
    for dtype in (torch.bfloat16, torch.float16):
        narrowed = scale.to(dtype)
        if torch.equal(narrowed.float(), scale):
            return narrowed
    return scale
