"""The error of plans."""

from lvllm.errors import LvllmError

__all__ = ["PlanError"]


class PlanError(LvllmError):
    """A model or a machine that cannot be planned. The text says what is wrong in one line."""
