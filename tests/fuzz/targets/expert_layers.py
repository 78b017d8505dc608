"""Layers of the engine and batches for them, as callers of `lvllm.engine` can give them.

The input chooses a random layer with its batch, and changes of their tensors and numbers. What is
not changed is compared with the reference in float32.
"""

from collections.abc import Callable
from typing import Any

import torch

from lvllm.engine import ExpertLayer, LinearLayer, bank
from lvllm.engine.weight_formats import FORMATS, GROUP_SIZES
from tests.fuzz.choices import Choices
from tests.random_layers import ACTIVATIONS, Layer, Random, random_layer

DTYPES = (
    *(torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
    torch.complex64,
)
NUMBERS = (-1, 0, 1, 2, 3, 5, 16, 31, 32, 64, 128, 1 << 31, 1 << 40, (1 << 63) - 1, -(1 << 63))
FACTORS = (0.0, -1.0, 7.0, 1e-40, 1e38, float("inf"), float("nan"))


def one_input(data: bytes) -> None:
    choices = Choices(data)
    kind = choices.below(8)
    if kind == 0:
        _linear(choices)
    elif kind == 1:
        _memory(choices)
    else:
        _experts(choices)


def _experts(choices: Choices) -> None:
    written, x, ids, weights = _case(choices)
    arguments: dict[str, Any] = {
        name: value.clone() if isinstance(value, torch.Tensor) else value
        for name, value in written.arguments.items()
    }
    changed = choices.flag()
    if changed:
        name = choices.of(sorted(arguments))
        if name.startswith(("w13_", "w2_")) and choices.flag():
            del arguments[name]
        else:
            arguments[name] = _changed(arguments[name], choices)
    if (layer := _refused(lambda: ExpertLayer(**arguments))) is None:
        assert changed, "a sound layer is refused"
        return
    batch = {"x": x, "topk_ids": ids, "topk_weights": weights}
    if choices.flag():
        name, changed = choices.of(sorted(batch)), True
        batch[name] = _changed(batch[name], choices)
    y = _refused(lambda: layer(**batch))
    if changed:
        if y is not None:
            assert y.shape == batch["x"].shape
            assert y.dtype == batch["x"].dtype
    else:
        assert y is not None, "a sound batch is refused"
        error = (y.float() - written.reference(x, ids, weights)).norm()
        # Wider than in tests/engine/random_case.py: few values do not average out.
        size = (x.shape[0] * x.shape[1]) ** 0.5
        assert error <= 0.1 * (size + float(y.float().norm())), f"an error of {error}"
    layer.release()


def _case(choices: Choices) -> tuple[Layer, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A sound layer with a sound batch."""
    random = Random(choices.below(1 << 16))
    format = choices.of(sorted(FORMATS))
    values = FORMATS[format].values
    experts, tokens, topk = choices.between(1, 4), choices.below(40), choices.below(4)
    hidden, intermediate = values * choices.between(1, 80), values * choices.between(1, 70)
    activation = choices.of(ACTIVATIONS)
    layer = random_layer(
        random,
        format,
        experts,
        hidden,
        intermediate,
        activation=activation,
        bias=choices.flag(),
        group_size=choices.of((-1, *GROUP_SIZES)),
        fp8_scale=choices.of(("block", "channel", "tensor")),
        zero=choices.flag(),
        interleaved=choices.flag() and activation != "relu2",
        activation_bits=choices.of(FORMATS[format].activation_bits),
        apply_router_weight_on_input=choices.flag(),
    )
    x = random.normal(tokens, hidden).to(choices.of((torch.bfloat16, torch.float16)))
    ids = random.integers(-1, experts, tokens, topk).to(choices.of((torch.int32, torch.int64)))
    return layer, x, ids, random.uniform(0.1, 1.1, tokens, topk)


def _linear(choices: Choices) -> None:
    rows, columns = choices.between(1, 200), choices.between(1, 200)
    weight: Any = torch.randn(rows, columns).to(choices.of((torch.bfloat16, torch.float16)))
    x: Any = torch.randn(choices.below(5), columns).to(torch.bfloat16)
    if choices.flag():
        weight = _changed(weight, choices)
    if choices.flag():
        x = _changed(x, choices)
    format, bits = choices.of((*FORMATS, "")), choices.of((None, 8, 16, 3))
    layer = _refused(lambda: LinearLayer(weight, format=format, activation_bits=bits))
    if layer is not None and (y := _refused(lambda: layer(x))) is not None:
        assert y.shape == (*x.shape[:-1], weight.shape[0])


def _memory(choices: Choices) -> None:
    shape = [choices.of(NUMBERS) for _ in range(choices.below(5))]
    dtype, parts = choices.of(DTYPES), choices.of(NUMBERS)
    memory = _refused(lambda: bank.allocate(shape, dtype, parts=parts))
    assert memory is None or list(memory.shape) == shape


def _changed(value: Any, choices: Choices) -> Any:
    """Another value in the place of an argument."""
    match value:
        case bool():
            return not value
        case int() | None:
            return choices.of((*NUMBERS, None))
        case float():
            return choices.of(FACTORS)
        case str():
            return choices.of((*FORMATS, *ACTIVATIONS, ""))
    changes: tuple[Callable[[], Any], ...] = (
        lambda: value.to(choices.of(DTYPES)),
        lambda: value.transpose(0, -1) if value.dim() else value,
        lambda: value.reshape(-1),
        lambda: value[..., :: choices.between(1, 3)],
        lambda: value[choices.below(3) :],
        lambda: value[:1].expand(*value.shape) if value.shape[:1] != (0,) else value,
        lambda: value[None],
        lambda: value.sum(),
        lambda: value.to("meta"),
        lambda: value.to_sparse(),
        lambda: torch.empty_like(value, requires_grad=value.is_floating_point()),
        lambda: _damaged(value, choices),
    )
    try:
        return choices.of(changes)()
    except (RuntimeError, IndexError):  # PyTorch does not make such a tensor.
        return value


def _damaged(tensor: torch.Tensor, choices: Choices) -> torch.Tensor:
    """The same tensor with other bytes in some places."""
    damaged = tensor.contiguous().clone()
    data = damaged.view(-1).view(torch.uint8)
    for _ in range(choices.below(8)):
        if len(data):
            at = choices.below(len(data))
            taken = torch.tensor([*choices.take(8)], dtype=torch.uint8)[: len(data) - at]
            data[at : at + len(taken)] = taken
    return damaged


def _refused(function: Callable[[], Any]) -> Any:
    """The function's result; None if it refuses its arguments as the engine's docstrings say."""
    try:
        return function()
    except (ValueError, MemoryError) as error:
        line = str(error)
    except NotImplementedError:
        return None  # PyTorch itself calls no operator of the engine with sparse or meta tensors.
    assert line.splitlines() == [line], f"several lines, or none: {line!r}"
    return None
