"""An answer while it comes: its text, its tokens and its times."""

import time
from collections.abc import Iterable, Iterator

from lvllm.chat.client import Chunk
from lvllm.chat.thinking import Piece, ThinkingSplitter

__all__ = ["Answer"]


class Answer:
    """Collects one answer. Its times count from the creation of this object, so ask after it."""

    def __init__(self) -> None:
        self.text = ""
        """The answer so far, without thinking."""
        self.tokens: int | None = None
        """How many tokens the answer has, thinking included; None if the server does not say."""
        self.cut_off = False
        """Whether the answer ended because it reached a limit of tokens."""
        self._asked = time.monotonic()
        self._first: float | None = None
        self._last = self._asked

    def pieces(self, chunks: Iterable[Chunk]) -> Iterator[Piece]:
        """The pieces to show, none of them empty, each as soon as its chunk is there."""
        splitter = ThinkingSplitter()
        for chunk in chunks:
            if chunk.text or chunk.thinking:
                self._last = time.monotonic()
                self._first = self._first or self._last
            if chunk.tokens is not None:
                self.tokens = chunk.tokens
            self.cut_off = self.cut_off or chunk.finish_reason == "length"
            if chunk.thinking:
                yield Piece(chunk.thinking, thinking=True)
            yield from self._collect(splitter.feed(chunk.text))
        yield from self._collect(splitter.finish())

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
    def tokens_per_second(self) -> float | None:
        """The rate of all tokens after the first; None if it is not known."""
        if self.tokens is None or self.tokens < 2 or self._first is None:
            return None
        seconds = self._last - self._first
        return (self.tokens - 1) / seconds if seconds > 0 else None
