"""The packed tensors of 4- and 8-bit checkpoints as the engine's row-major arrays.

Each function takes one tensor of one projection of one expert: N output rows, K inputs, G groups
along K. The engine's arrays are

- int4: codes uint8 [N, K/2], two in a byte, that of the even input in the low nibble. A weight is
  (code - zero) * scale; zero is uint8 [N, G], or 8 everywhere if there is none.
- int8: int8 [N, K]; zero is int8 [N, G]. The engine computes no int8 with zero points, so such
  experts are converted.
- scales: [N, G].

Checkpoints pack 8 or 4 codes into an int32, the first in the lowest bits, so on a little-endian
machine, the only kind that the engine runs on, the bytes of a word hold its codes in order.

All functions raise ValueError, in one line that names the tensor as its format does, if a tensor is
not what the docstring says. What they return never shares memory with their argument.
"""

import torch

from lvllm.units import ceil_div

__all__ = [
    "awq_int4",
    "awq_zero",
    "compressed_zero",
    "compressed_zero8",
    "gptq_int4",
    "gptq_int8",
    "gptq_zero",
    "gptq_zero8",
    "group_scale",
]


def awq_int4(qweight: torch.Tensor) -> torch.Tensor:
    """AutoAWQ's `qweight`, int32 [K, N/8] of an even K, as codes uint8 [N, K/2].

    A word holds outputs 0, 2, 4, 6, 1, 3, 5, 7 of its eight, of one input.
    """
    _check_words("qweight", qweight, "[K, N/8]")
    inputs, words = qweight.shape
    if inputs % 2:
        raise _refused("qweight", qweight, "int32 [K, N/8] with an even K")
    even, odd = qweight[0::2], qweight[1::2]
    codes = qweight.new_empty((words * 8, inputs // 2), dtype=torch.uint8)
    # Inputs are paired while outputs still lie side by side, so that whole words are transposed.
    # Byte 2q + p of a word has output 4p + q in its low nibble and output 4p + 2 + q in its high.
    by_output = codes.view(words, 2, 2, 2, inputs // 2)  # word, p, high nibble, q, pair of inputs
    low_nibbles = 0x0F0F0F0F
    low = (odd & low_nibbles).bitwise_left_shift_(4).bitwise_or_(even & low_nibbles)
    high = (even >> 4).bitwise_and_(low_nibbles).bitwise_or_(odd & ~low_nibbles)
    for nibble, pairs in enumerate((low, high)):
        by_word = _transposed(pairs).view(torch.uint8).view(words, inputs // 2, 2, 2)
        by_output[:, :, nibble].copy_(by_word.permute(0, 3, 2, 1))
    return codes


def awq_zero(qzeros: torch.Tensor) -> torch.Tensor:
    """AutoAWQ's `qzeros`, int32 [G, N/8] in the order of `awq_int4`, as zero uint8 [N, G]."""
    _check_words("qzeros", qzeros, "[G, N/8]")
    return _transposed(_nibbles(qzeros)[..., [0, 4, 1, 5, 2, 6, 3, 7]].flatten(1))


def gptq_int4(qweight: torch.Tensor) -> torch.Tensor:
    """4-bit `qweight` of GPTQ and of AutoRound's auto_gptq packing as codes uint8 [N, K/2].

    It is int32 [K/8, N]: a word holds eight inputs of one output, in order. The packing has no
    padding, so K is a multiple of 8.
    """
    _check_words("qweight", qweight, "[K/8, N]")
    return _transposed(qweight).view(torch.uint8)


def gptq_int8(qweight: torch.Tensor) -> torch.Tensor:
    """8-bit symmetric `qweight`, int32 [K/4, N] of codes from 0 to 255, as int8 [N, K]."""
    _check_words("qweight", qweight, "[K/4, N]")
    # Flipping the highest bit subtracts 128.
    return _transposed(qweight).view(torch.uint8).bitwise_xor_(0x80).view(torch.int8)


def gptq_zero(qzeros: torch.Tensor, v2: bool = False) -> torch.Tensor:
    """4-bit `qzeros` of GPTQ, int32 [G, N/8] in order, as zero uint8 [N, G].

    Symmetric checkpoints have them too. All are 8, but not always stored as `checkpoint_format`
    says, so it is better not to read them.

    Args:
        v2: whether `checkpoint_format` is gptq_v2, which stores zero points as they are. Otherwise
            they are stored minus one.
    """
    _check_words("qzeros", qzeros, "[G, N/8]")
    # One was subtracted from whole words, so a zero point of 0 has borrowed from its neighbour.
    return _transposed(_nibbles(qzeros if v2 else qzeros + 0x11111111).flatten(1))


def gptq_zero8(qzeros: torch.Tensor, v2: bool = False) -> torch.Tensor:
    """8-bit `qzeros` of GPTQ, int32 [G, N/4], as zero int8 [N, G]; see `gptq_zero`."""
    _check_words("qzeros", qzeros, "[G, N/4]")
    words = (qzeros if v2 else qzeros + 0x01010101).clone(memory_format=torch.contiguous_format)
    return _transposed(words.view(torch.uint8).bitwise_xor_(0x80).view(torch.int8))


def group_scale(scales: torch.Tensor) -> torch.Tensor:
    """`scales` of AutoAWQ and GPTQ, [G, N] of any float type, as contiguous [N, G]."""
    if scales.dim() != 2:
        raise _refused("scales", scales, "[G, N]")
    return _transposed(scales)


def compressed_zero(weight_zero_point: torch.Tensor, rows: int) -> torch.Tensor:
    """4-bit `weight_zero_point`, int32 [N/8, G], rounded up, as zero uint8 [N, G]; N is `rows`.

    A word holds eight outputs of one group, in order, as their values plus 8.
    """
    _check_words("weight_zero_point", weight_zero_point, "[N/8, G]")
    if len(weight_zero_point) != ceil_div(rows, 8):
        raise _refused(
            "weight_zero_point", weight_zero_point, f"[{ceil_div(rows, 8)}, G] of N={rows}"
        )
    return _nibbles(weight_zero_point).transpose(1, 2).flatten(0, 1)[:rows].contiguous()


def compressed_zero8(weight_zero_point: torch.Tensor, rows: int) -> torch.Tensor:
    """8-bit `weight_zero_point`, int32 [N/4, G], rounded up, as zero int8 [N, G]; N is `rows`."""
    _check_words("weight_zero_point", weight_zero_point, "[N/4, G]")
    if len(weight_zero_point) != ceil_div(rows, 4):
        raise _refused(
            "weight_zero_point", weight_zero_point, f"[{ceil_div(rows, 4)}, G] of N={rows}"
        )
    whole = weight_zero_point.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    codes = whole.bitwise_xor_(0x80).view(torch.int8).unflatten(1, (-1, 4))
    return codes.transpose(1, 2).flatten(0, 1)[:rows].contiguous()


def _transposed(matrix: torch.Tensor) -> torch.Tensor:
    """A copy. For a single row or column `contiguous` would keep strides that no view can take."""
    return matrix.t().clone(memory_format=torch.contiguous_format)


def _nibbles(words: torch.Tensor) -> torch.Tensor:
    """int32 [A, B] -> uint8 [A, B, 8]: the codes of each word from its lowest bits on."""
    whole = words.clone(memory_format=torch.contiguous_format)
    pairs = whole.view(torch.uint8).unflatten(1, (words.shape[1], 4))
    return torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(2)


def _check_words(name: str, tensor: torch.Tensor, shape: str) -> None:
    if tensor.dtype != torch.int32 or tensor.dim() != 2:
        raise _refused(name, tensor, f"int32 {shape}")


def _refused(name: str, tensor: torch.Tensor, wanted: str) -> ValueError:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return ValueError(f"{name} is {dtype} {list(tensor.shape)}, wanted {wanted}")
