"""Triton kernels that compute experts from the bytes that lk keeps.

They are imported only where they run.

- blocks.py finds which expert and which rows a program computes.
- weights.py reads a block of weights in any of the formats.
- activation.py applies the activation.
- experts.py has the three kernels and starts them.
"""
