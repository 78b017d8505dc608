"""The family of errors that LvLLM raises about what a user gave it: settings, files, models.

The text of each is one line for the user: what is wrong, its name and value, and what is allowed.
Whoever starts LvLLM prints that line and exits with code 1; only other errors show a traceback.
"""

__all__ = ["LvllmError"]


class LvllmError(ValueError):
    """An error whose text is one line that a user can act upon."""
