"""Dequantise stored experts to float32.

The functions take the arguments of `ExpertLayer` that hold weights. They also understand three
kinds of weights that the engine does not compute:

- int8 with w13_zero [E, rows, groups], and w2 alike;
- int4 and int8 with w13_order int32 [E, 2, columns] (for gate and up) and w2_order [E, 1, columns],
  which give the group of each column if the columns of a group do not follow one another;
- int4 and int8 in groups of any size.

All operations are elementwise, so the result has the same bits on every device.
"""

from typing import Any

import torch

from lvllm.engine import weight_formats

__all__ = ["computable", "format_of", "nibbles", "values"]

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def computable(tensors: dict[str, Any]) -> bool:
    """Whether the engine computes these tensors as they are."""
    if "w13_order" in tensors:
        return False
    formats = {format_of(tensors, name) for name in ("w13", "w3", "w2")}
    if formats.isdisjoint(weight_formats.GROUPED):
        return True
    if "int8" in formats and "w13_zero" in tensors:
        return False
    return tensors.get("group_size") in (None, -1, *weight_formats.GROUP_SIZES)


def format_of(tensors: dict[str, Any], name: str) -> str:
    """The format of "w13", "w3" or "w2"."""
    format: str = tensors.get(f"{name}_format") or tensors["format"]
    return format


def values(tensors: dict[str, Any], name: str, expert: int, device: str = "cpu") -> torch.Tensor:
    """The values of one expert's w13 or w2: float32 [rows, columns] on `device`.

    w13 has the gate rows and then the up rows, also if these are stored in w3.
    """
    found = _values(tensors, name, expert, device)
    if name == "w13" and tensors.get("w3") is not None:
        return torch.cat((found, _values(tensors, "w3", expert, device)))
    return found


def _values(tensors: dict[str, Any], name: str, expert: int, device: str) -> torch.Tensor:
    """The same of one tensor and its scales."""

    def of_expert(suffix: str) -> torch.Tensor | None:
        of_all: torch.Tensor | None = tensors.get(name + suffix)
        return None if of_all is None else of_all[expert].to(device)

    stored, scale = of_expert(""), of_expert("_scale")
    zero, order = of_expert("_zero"), of_expert("_order")
    assert stored is not None
    format = format_of(tensors, name)
    if format in ("bf16", "fp16"):
        return stored.float()
    if format in weight_formats.BLOCK_FORMATS:
        return _blocks(stored, format)
    assert scale is not None
    if format == "fp8":
        return stored.float() * _fp8_scale(scale, *stored.shape)
    if format == "mxfp4":
        return _e2m1(stored) * _by_column(_e8m0(scale), 2 * stored.shape[1], 32)
    if format == "nvfp4":
        global_scale = of_expert("_global_scale")
        assert global_scale is not None
        by_part = global_scale.view(-1, 1, 1)
        scale = (scale.float().unflatten(0, (len(by_part), -1)) * by_part).flatten(0, 1)
        return _e2m1(stored) * _by_column(scale, 2 * stored.shape[1], 16)
    codes = stored.float() if format == "int8" else nibbles(stored).float()
    columns = codes.shape[1]
    scale = scale.view(len(scale), -1)
    size = tensors.get("group_size")
    if size in (None, -1):
        size = columns // scale.shape[1]
    if zero is None:
        centred = codes - (0.0 if format == "int8" else 8.0)
    else:
        centred = codes - _by_column(zero.view(scale.shape), columns, size, order)
    return centred * _by_column(scale, columns, size, order)


def _by_column(
    scale: torch.Tensor, columns: int, size: int, order: torch.Tensor | None = None
) -> torch.Tensor:
    """The scale or zero point of each column: [rows, groups] -> float32 [rows, columns].

    A group has `size` columns, unless `order` [parts, columns] gives the group of each column.
    """
    scale = scale.float()
    if order is None:
        return scale.repeat_interleave(size, dim=1)[:, :columns]
    parts = scale.unflatten(0, (len(order), -1))
    return torch.cat([part[:, groups] for part, groups in zip(parts, order, strict=True)])


def _blocks(stored: torch.Tensor, format: str) -> torch.Tensor:
    """The values of blocks as a GGUF file has them: uint8 [rows, bytes] -> [rows, columns]."""
    # The package takes 0.7 s to import, which only GGUF files are to pay for.
    from gguf import GGMLQuantizationType, dequantize

    found = dequantize(stored.cpu().numpy(), GGMLQuantizationType[format.upper()])
    return torch.from_numpy(found).to(stored.device)


def _fp8_scale(scale: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The scale of blocks, of rows or of the whole matrix, broadcastable to [rows, columns]."""
    if scale.dim() < 2:
        return scale.view(-1, 1)
    scale = scale.repeat_interleave(weight_formats.BLOCK, dim=0)[:rows]
    return scale.repeat_interleave(weight_formats.BLOCK, dim=1)[:, :columns]


def nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Unpack uint8 [rows, columns / 2] to codes [rows, columns], the low nibbles first."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def _e2m1(packed: torch.Tensor) -> torch.Tensor:
    table = torch.tensor((*E2M1, *(-value for value in E2M1)), device=packed.device)
    return table.float()[nibbles(packed).int()]


def _e8m0(scale: torch.Tensor) -> torch.Tensor:
    """e8m0 codes as float32. A code has the bits of a float32's exponent.

    Only the code 0, which is 2^-127, is a subnormal number and needs other bits.
    """
    bits = scale.int() << 23
    return torch.where(scale == 0, torch.full_like(bits, 1 << 22), bits).view(torch.float32)
