"""Separates a model's thinking from its answer, in a text that arrives in pieces."""

from dataclasses import dataclass

__all__ = ["Piece", "ThinkingSplitter"]

OPEN, CLOSE = "<think>", "</think>"


@dataclass(frozen=True)
class Piece:
    """Some text, and whether it is thinking or the answer."""

    text: str
    thinking: bool = False


class ThinkingSplitter:
    """Finds `<think>...</think>` at the beginning of a text, wherever its pieces are cut.

    Several such blocks may follow each other. White space before, between and after them belongs to
    neither. After the first other character all is answer, because an answer may speak about these
    tags. A block that never ends is thinking.
    """

    def __init__(self) -> None:
        self._held = ""  # What may be the beginning of a tag.
        self._state = "before"  # Then "thinking" and "before" in turns, and at last "answer".
        self._blocks = 0

    def feed(self, text: str) -> list[Piece]:
        """The pieces that are certain after `text`, none of them empty."""
        text = self._held + text
        self._held = ""
        pieces: list[Piece] = []
        while text:
            if self._state == "answer":
                pieces.append(Piece(text))
                break
            if self._state == "thinking":
                thought, tag, text = text.partition(CLOSE)
                if tag:
                    self._state = "before"
                else:
                    size = _beginning_of(CLOSE, thought)
                    self._held = thought[len(thought) - size :]
                    thought = thought[: len(thought) - size]
                if thought:
                    pieces.append(Piece(thought, thinking=True))
                continue
            start = text.lstrip()
            if start.startswith(OPEN):
                self._state = "thinking"
                self._blocks += 1
                text = start.removeprefix(OPEN)
            elif OPEN.startswith(start):  # "" does, too.
                self._held = text
                break
            else:
                self._state = "answer"
                text = start if self._blocks else text
        return pieces

    def finish(self) -> list[Piece]:
        """What was held back, now that the text is complete."""
        held, self._held = self._held, ""
        if self._state == "before" and self._blocks:
            held = held.lstrip()
        return [Piece(held, self._state == "thinking")] if held else []


def _beginning_of(tag: str, text: str) -> int:
    """How many characters at the end of `text` may be the beginning of `tag`."""
    return next(size for size in range(len(tag) - 1, -1, -1) if text.endswith(tag[:size]))
