"""Measures a server with all combinations of prompts and users."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lvllm.bench.load import Endpoint, LoadGenerator
from lvllm.bench.speed import Result, result_of

__all__ = ["Grid", "measure"]

LEAST_REQUESTS = 4
"""Of a cell, so that one slow request among few does not decide."""
WARM_UP = 4
"""Tokens of the answer to the first request, whose times do not count: vLLM still allocates, and
may compile."""


@dataclass(frozen=True)
class Grid:
    """What is measured: each length of prompts with each number of users."""

    prompts: Sequence[int]
    users: Sequence[int]
    answer: int
    """Tokens of an answer."""
    rounds: int
    """Requests of each user, of which there are at least LEAST_REQUESTS together."""

    @property
    def cells(self) -> list[tuple[int, int]]:
        """Lengths of prompts and numbers of users, in the order in which they are measured."""
        return [(prompt, users) for prompt in self.prompts for users in self.users]


def measure(
    generator: LoadGenerator, to: Endpoint, grid: Grid, say: Callable[[str], None]
) -> list[Result]:
    """The results for each cell of the grid.

    Prompts differ in all cells, so that no prefix of one is in the server's cache.

    Args:
        say: is told what is measured next.

    Raises BenchError if a request fails.
    """
    say("warm-up")
    generator.send(to, max(grid.prompts), min(WARM_UP, grid.answer), 1, 1, seed=0)
    found = []
    for number, (prompt, users) in enumerate(grid.cells, 1):
        say(f"{number} of {len(grid.cells)}: prompts of {prompt} tokens, users: {users}")
        count = max(grid.rounds * users, LEAST_REQUESTS)
        requests = generator.send(to, prompt, grid.answer, users, count, seed=number)
        found.append(result_of(requests, grid.answer, users))
    return found
