"""Proof that layers of experts compute what their weights say, and that the weights look sound.

`layer` compares the engine with `reference`, plain PyTorch in float32, on the weights as they lie
in memory; `weights` looks for damage in them; `model` does both for all layers of a process.
"""
