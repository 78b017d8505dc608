"""What every input must end in, whatever its bytes are: a value or one line, in bounded memory."""

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

from lvllm.errors import LvllmError

__all__ = ["Target", "ask", "bounded"]

MOST_MEMORY = 512 << 20
"""Bytes of address space that one input may add. Inputs are small, but some make transformers
import a family's code, or start the engine's threads."""
MOST_OF_A_LINE = 2000
"""Characters. A line quotes at most some values, each cut, and some paths."""

Target = Callable[[bytes], None]
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def ask(
    function: Callable[Parameters, Result], *args: Parameters.args, **options: Parameters.kwargs
) -> Result | None:
    """The function's result; None if it refuses its arguments in one line for the user.

    Any other error passes, and is a failure.
    """
    try:
        return function(*args, **options)
    except LvllmError as error:
        line = str(error)
        assert line.strip(), "an error without text"
        assert line.splitlines() == [line], f"an error of several lines: {line!r}"
        assert len(line) <= MOST_OF_A_LINE, f"a line of {len(line)} characters: {line[:300]}"
        return None


@contextmanager
def bounded() -> Iterator[None]:
    """Let the block take at most MOST_MEMORY more; beyond that it gets a MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MOST_MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
