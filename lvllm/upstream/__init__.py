"""Layers, kernels and configurations that LvLLM registers through vLLM's public functions."""
