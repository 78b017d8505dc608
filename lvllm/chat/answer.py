"""An answer while it comes: its text, its tokens and its times."""

import time
from collections.abc import Iterable, Iterator

from lvllm.chat.client import Call, Chunk
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
        self.calls: dict[int, Call] = {}
        """The tool calls so far, by their index."""
        self._splitter = ThinkingSplitter()
        self._asked = time.monotonic()
        self._first: float | None = None
        self._last = self._asked

    def pieces(self, chunks: Iterable[Chunk]) -> Iterator[Piece]:
        """The pieces to show, none of them empty, each as soon as its chunk is there."""
        for chunk in chunks:
            yield from self.feed(chunk)
        yield from self.finish()

    def feed(self, chunk: Chunk) -> Iterator[Piece]:
        """The pieces that are certain after `chunk`."""
        if chunk.text or chunk.thinking or chunk.calls:
            self._last = time.monotonic()
            self._first = self._first or self._last
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

    def numbers(self) -> list[str]:
        """What is known: `42 tokens`, `the first after 120 ms`, `35.1 tokens/s`."""
        said = []
        if self.tokens is not None:
            said.append(f"{self.tokens} token{'s' * (self.tokens != 1)}")
        if self.first_token_ms is not None:
            said.append(f"the first after {self.first_token_ms:.0f} ms")
        if self.tokens_per_second is not None:
            said.append(f"{self.tokens_per_second:.1f} tokens/s")
        if self.cut_off:
            said.append("cut off at the limit of tokens")
        return said
