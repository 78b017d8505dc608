"""Predicts the speed of GPU offload: its own scheduling code on a GPU of rates and virtual time."""
