"""Triton kernels that compute experts from the bytes that lk keeps.

They are imported only where they run.

- blocks.py finds which expert and which rows a program computes.
- weights.py reads a block of weights in any of the formats, and block_weights.py in GGUF's types:
  block_codes.py unpacks codes that are numbers, block_entries.py those that are entries of tables,
  which codebooks.py has.
- activation.py applies the activation.
- experts.py has the three kernels and starts them.
"""

__all__ = ["BLOCK_ROWS"]

BLOCK_ROWS = (16, 64, 128)
"""The rows of a block of pairs: the fewest that hold an expert's rows on average, since
tensor cores compute all of them. More rows convert a weight fewer times."""
