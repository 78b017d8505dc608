"""Regular expressions that a user or a checkpoint wrote: each is refused, or its search ends soon.

Python's own library needs longer than anybody waits for some: `(.+)+!` doubles the time of a search
with each character of the name. The regex library, which vLLM uses for such expressions, has a
limit of time, and understands the same.
"""

import regex

__all__ = ["PatternError", "begins", "check", "occurs"]

MOST_SECONDS = 0.1
"""CPU time of one search. A usual one in a module's name takes a microsecond."""


class PatternError(ValueError):
    """A regular expression that cannot be used. The text says why, in one line."""


def check(pattern: str) -> None:
    """Raise PatternError for what is no regular expression."""
    _compiled(pattern)


def occurs(pattern: str, text: str) -> bool:
    """Whether any part of a text matches. Raises PatternError."""
    return _found(pattern, text, "search")


def begins(pattern: str, text: str) -> bool:
    """Whether a beginning of a text matches. Raises PatternError."""
    return _found(pattern, text, "match")


def _found(pattern: str, text: str, how: str) -> bool:
    compiled = _compiled(pattern)
    try:
        return getattr(compiled, how)(text, timeout=MOST_SECONDS) is not None
    except TimeoutError:
        raise PatternError(
            f"{_cut(pattern)} takes too long to be looked for in {text!r}: write it simpler"
        ) from None


def _compiled(pattern: str) -> regex.Pattern[str]:
    try:
        return regex.compile(pattern)
    # The last two: a count such as a{9999999999}, and thousands of groups in each other.
    except (regex.error, OverflowError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise PatternError(f"{_cut(pattern)} is no regular expression: {said}") from None


def _cut(pattern: str) -> str:
    """The expression for an error's line."""
    shown = pattern if pattern.isprintable() else repr(pattern)[1:-1]
    return f"'{shown[:200]}...'" if len(shown) > 200 else f"'{shown}'"
