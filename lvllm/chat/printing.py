"""Prints answers while they come."""

import sys
from collections.abc import Iterable
from io import TextIOWrapper

import typer

from lvllm.chat.thinking import Piece

__all__ = ["note", "prepare_streams", "print_pieces"]

# A model's text must not control the terminal, so it may contain no escape sequence.
CONTROLS = dict.fromkeys(code for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t")


def prepare_streams() -> None:
    """Let characters that the terminal's encoding does not have become `?`."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")


def print_pieces(pieces: Iterable[Piece]) -> None:
    """Print `pieces` as they come, thinking dimmed, and end the line, also after an exception."""
    last = Piece("\n")
    begun = False  # Whether something of this thinking, or of this answer, was printed.
    try:
        for piece in pieces:
            if piece.thinking != last.thinking:
                begun = False
            text = piece.text.translate(CONTROLS)
            if not begun:
                text = text.lstrip("\n")
            if not text:
                continue
            if not begun and not last.text.endswith("\n"):
                text = f"\n{text}"
            typer.echo(typer.style(text, dim=True) if piece.thinking else text, nl=False)
            last = Piece(text, piece.thinking)
            begun = True
    finally:
        if not last.text.endswith("\n"):
            typer.echo()


def note(text: str) -> None:
    """Print a dim line about the chat."""
    typer.secho(text, dim=True)
