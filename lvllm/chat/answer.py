"""An answer while it comes: its text, its tokens and its times."""

import time
from collections.abc import Iterable, Iterator

from lvllm.chat.client import Call, Chunk
from lvllm.chat.thinking import Piece, ThinkingSplitter

__all__ = ["Answer"]

WAITED = 0.001
"""Seconds after which a chunk has certainly been waited for. What is there already takes 0.1 ms."""
LEAST_SPAN = 0.1
"""Seconds from the first token to the last below which a busy machine's pauses hide the rate."""


class Answer:
    """Collects one answer. Its times count from the creation of this object, so ask after it."""

    def __init__(self) -> None:
        self.text = ""
        """The answer so far, without thinking."""
        self.tokens: int | None = None
        """How many tokens the answer has, thinking included; None if the server does not say."""
        self.cut_off = False
        """Whether the answer ended because it reached a limit of tokens."""
        self.calls: dict[int, Call] = {}
        """The tool calls so far, by their index."""
        self._splitter = ThinkingSplitter()
        self._asked = time.monotonic()
        self._first: float | None = None
        self._last = self._asked
        self._deltas = 0
        self._at_once = 0  # How many deltas came together with the first one.
        self._waited = 0.0  # For the deltas after the first one.

    def pieces(self, chunks: Iterable[Chunk]) -> Iterator[Piece]:
        """The pieces to show, none of them empty, each as soon as its chunk is there."""
        for chunk in chunks:
            yield from self.feed(chunk)
        yield from self.finish()

    def feed(self, chunk: Chunk) -> Iterator[Piece]:
        """The pieces that are certain after `chunk`."""
        if chunk.text or chunk.thinking or chunk.calls:
            self._count(chunk)
        if chunk.tokens is not None:
            self.tokens = chunk.tokens
        self.cut_off = self.cut_off or chunk.finish_reason == "length"
        for call in chunk.calls:
            old = self.calls.get(call.index, Call(call.index))
            added = Call(call.index, old.name + call.name, old.arguments + call.arguments)
            self.calls[call.index] = added
        if chunk.thinking:
            yield Piece(chunk.thinking, thinking=True)
        yield from self._collect(self._splitter.feed(chunk.text))

    def finish(self) -> Iterator[Piece]:
        """What was held back, now that all chunks are there."""
        yield from self._collect(self._splitter.finish())

    def _count(self, chunk: Chunk) -> None:
        """Note when a chunk with a part of the answer came."""
        if self._first is None:
            self._first = chunk.at
        else:
            self._waited += chunk.waited
        if self._at_once == self._deltas and (not self._deltas or chunk.waited < WAITED):
            self._at_once += 1
        self._deltas += 1
        self._last = chunk.at

    def _collect(self, pieces: list[Piece]) -> Iterator[Piece]:
        for piece in pieces:
            if not piece.thinking:
                self.text += piece.text
            yield piece

    @property
    def first_token_ms(self) -> float | None:
        """Milliseconds from the question to the first token; None before it has come."""
        return None if self._first is None else (self._first - self._asked) * 1e3

    @property
    def last_token_ms(self) -> float | None:
        """Milliseconds from the question to the last token so far; None before there is one."""
        return None if self._first is None else (self._last - self._asked) * 1e3

    @property
    def tokens_per_second(self) -> float | None:
        """The rate of the tokens after those that came first; None if it cannot be known.

        A server or a proxy may hold tokens back and send several at once, and the client may be
        slower than the server. The times of their arrival then say nothing about the server. So
        tokens that came together with the first one do not count, and there is a rate only if the
        client waited for most of the time between the first token and the last.
        """
        if not self.tokens or self._first is None or self._at_once == self._deltas:
            return None
        span = self._last - self._first
        if span < LEAST_SPAN or self._waited < span / 2:
            return None
        return self.tokens * (1 - self._at_once / self._deltas) / span

    def numbers(self) -> list[str]:
        """What is known: `42 tokens`, `the first after 120 ms`, `35.1 tokens/s`.

        Where several tokens have no rate, `all after 150 ms` is in its place.
        """
        said = []
        if self.tokens is not None:
            said.append(f"{self.tokens} token{'s' * (self.tokens != 1)}")
        if self.first_token_ms is not None:
            said.append(f"the first after {self.first_token_ms:.0f} ms")
        if self.tokens_per_second is not None:
            said.append(f"{self.tokens_per_second:.1f} tokens/s")
        elif self.last_token_ms is not None and (self.tokens or 0) > 1:
            said.append(f"all after {self.last_token_ms:.0f} ms")
        if self.cut_off:
            said.append("cut off at the limit of tokens")
        return said
