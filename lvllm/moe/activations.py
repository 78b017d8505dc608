"""Translate vLLM's activations into the engine's arguments."""

from typing import Any

__all__ = ["arguments"]

# DeepSeek-V4 limits gate and up, and then computes silu(gate) * up. This is swigluoai with alpha 1
# and beta 0.
LIMITED_SILU = {"activation": "swigluoai", "swiglu_alpha": 1.0, "swiglu_beta": 0.0}


def arguments(moe: Any) -> dict[str, Any]:
    """The activation of a layer's `FusedMoEConfig`, as arguments of `ExpertLayer`.

    Raises ValueError for an activation that the engine does not compute.
    """
    name, limit = moe.activation.value, moe.swiglu_limit
    given = {
        key: getattr(moe, key)
        for key in ("swiglu_alpha", "swiglu_beta", "swiglu_limit")
        if getattr(moe, key) is not None
    }
    match name:
        case "silu" if limit is not None:
            return LIMITED_SILU | {"swiglu_limit": limit}
        case "silu" | "gelu" | "gelu_tanh" if limit is None:
            return {"activation": name}
        case "relu2_no_mul" if limit is None:
            return {"activation": "relu2"}
        case "swigluoai":
            # The rows of gate and up alternate. The engine's default constants are gpt-oss's.
            return {"activation": name, "interleaved": True} | given
        case "swigluoai_uninterleave" if limit is not None:
            return LIMITED_SILU | given
        case "swiglustep":
            return {"activation": name, "swiglu_limit": 7.0 if limit is None else limit}
    limited = "" if limit is None else f" with swiglu_limit {limit}"
    raise ValueError(
        f"activation {name!r}{limited} is not supported; supported are silu with and without"
        " swiglu_limit, swigluoai, swigluoai_uninterleave with swiglu_limit, swiglustep, gelu,"
        " gelu_tanh and relu2_no_mul"
    )
