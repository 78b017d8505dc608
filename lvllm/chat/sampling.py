"""Settings of an answer, as fields of a request."""

from collections.abc import Callable, Mapping
from typing import Any

from lvllm.chat.client import ChatError

__all__ = ["sampling", "thinking"]

ALLOWED: Mapping[str, tuple[str, Callable[[float], bool]]] = {
    "temperature": ("0 to 2", lambda value: 0 <= value <= 2),
    "top_p": ("more than 0, at most 1", lambda value: 0 < value <= 1),
    "top_k": ("-1, 0 or more", lambda value: value >= -1),
    "max_tokens": ("at least 1", lambda value: value >= 1),
    "seed": ("a whole number of 64 bits", lambda value: -(2**63) <= value < 2**63),
}
"""The values that each sampling setting allows."""


def sampling(given: Mapping[str, float | None], prefix: str = "") -> dict[str, Any]:
    """The settings that are given, as fields of a request.

    Raises ChatError for a value that is not allowed. It calls the setting by its name behind
    `prefix`.
    """
    for name, value in given.items():
        values, allows = ALLOWED[name]
        if value is not None and not allows(value):
            option = prefix + name.replace("_", "-")
            raise ChatError(f"{option} {value} is not allowed: {values}")
    return {name: value for name, value in given.items() if value is not None}


def thinking(think: bool | None) -> dict[str, Any]:
    """The field of a request that switches thinking on or off; none if `think` is None."""
    return {} if think is None else {"chat_template_kwargs": {"enable_thinking": think}}
