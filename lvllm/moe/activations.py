"""What vLLM calls an activation, as the engine's arguments."""

from typing import Any

__all__ = ["arguments"]

# DeepSeek-V4's: gate and up are limited, and nothing else is done to them.
PLAIN = {"activation": "swigluoai", "swiglu_alpha": 1.0, "swiglu_beta": 0.0}


def arguments(moe: Any) -> dict[str, Any]:
    """The activation of a layer's `FusedMoEConfig`, as arguments of `ExpertLayer`.

    Raises ValueError for one that the engine has not.
    """
    name, limit = moe.activation.value, moe.swiglu_limit
    given = {
        key: getattr(moe, key)
        for key in ("swiglu_alpha", "swiglu_beta", "swiglu_limit")
        if getattr(moe, key) is not None
    }
    match name:
        case "silu" if limit is not None:
            return PLAIN | {"swiglu_limit": limit}
        case "silu" | "gelu" | "gelu_tanh" if limit is None:
            return {"activation": name}
        case "relu2_no_mul" if limit is None:
            return {"activation": "relu2"}
        case "swigluoai":
            # Rows of gate and up take turns. The engine's defaults are gpt-oss's constants, too.
            return {"activation": name, "interleaved": True} | given
        case "swigluoai_uninterleave" if limit is not None:
            return PLAIN | given
        case "swiglustep":
            return {"activation": name, "swiglu_limit": 7.0 if limit is None else limit}
    limited = "" if limit is None else f" with swiglu_limit {limit}"
    raise ValueError(
        f"activation {name!r}{limited} is not supported; supported are silu with and without"
        " swiglu_limit, swigluoai, swigluoai_uninterleave with swiglu_limit, swiglustep, gelu,"
        " gelu_tanh and relu2_no_mul"
    )
