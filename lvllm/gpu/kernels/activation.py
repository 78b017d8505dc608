"""Applies the activation of `lvllm.engine.activations` to the sums of a block."""

import triton
import triton.language as tl

__all__ = ["apply"]


@triton.jit
def apply(gate, up, alpha, beta, limit, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """Apply the activation to float32 [M, N]. An activation without a gate gets `up` alone."""
    if ACTIVATION == "relu2":
        positive = tl.maximum(up, 0.0)
        return positive * positive
    elif ACTIVATION == "silu":
        return gate * tl.sigmoid(gate) * up
    elif ACTIVATION == "gelu":
        return 0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476)) * up
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(z)) / 2 is sigmoid(2 z), and z has the factor sqrt(2 / pi).
        inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        return gate * tl.sigmoid(inner) * up
    elif ACTIVATION == "swiglustep":
        activated = tl.minimum(gate * tl.sigmoid(gate), limit)
        return activated * tl.minimum(tl.maximum(up, -limit), limit)
    else:  # swigluoai
        gate = tl.minimum(gate, limit)
        return (tl.minimum(tl.maximum(up, -limit), limit) + beta) * gate * tl.sigmoid(alpha * gate)
