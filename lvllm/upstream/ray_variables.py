"""LvLLM's environment variables in Ray's actors.

vLLM copies those whose names begin with VLLM_ and some others, so that on a running Ray cluster the
plugin of every worker would find its switch off. vLLM takes more prefixes from a variable.
"""

import os

__all__ = ["copy_ours"]

PREFIXES = ("LVLLM_", "LK_")
MORE_PREFIXES = "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"


def copy_ours() -> None:
    """Have vLLM copy LvLLM's variables, beside those that a user has named."""
    given = [name.strip() for name in os.environ.get(MORE_PREFIXES, "").split(",")]
    os.environ[MORE_PREFIXES] = ",".join(dict.fromkeys([*filter(None, given), *PREFIXES]))
