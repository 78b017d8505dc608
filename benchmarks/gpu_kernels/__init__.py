"""Compiles the Triton kernels for the GPUs that people have, and shows what they need."""
