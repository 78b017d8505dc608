"""The tables of numbers that IQ1, IQ2 and IQ3 look weights up in, on a device.

They come from the `gguf` package, as those of lk do (build_tools/codebooks.py).
"""

import functools

import numpy as np
import torch

__all__ = ["LOOKED_UP", "codebook"]

LOOKED_UP = {"iq1_s": 8, "iq1_m": 8} | dict.fromkeys(
    ("iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s"), 1
)
"""The formats that have tables, and by what their numbers are multiplied: to the weights of IQ1,
1/8 is added."""


@functools.cache
def codebook(format: str, device: torch.device) -> torch.Tensor:
    """The table of one of LOOKED_UP: int32, four numbers a word, the first one in its low byte.

    An entry of IQ1 and IQ2 has two words, one of IQ3 has one.
    """
    # The package takes 0.7 s to import, which only GGUF files are to pay for.
    from gguf import quants

    table = getattr(quants, format.upper())
    table.init_grid()
    numbers = (table.grid * LOOKED_UP[format]).astype(np.int8)
    return torch.from_numpy(numbers.reshape(-1).view(np.int32)).to(device)
