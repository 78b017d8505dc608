"""One question from a pipe, and its answer without decoration."""

import sys
from typing import Any

from lvllm.chat.answer import Answer
from lvllm.chat.client import ChatError, Client
from lvllm.chat.conversation import Conversation
from lvllm.chat.printing import print_pieces

__all__ = ["answer_once"]


def answer_once(client: Client, model: str, options: dict[str, Any], system: str) -> None:
    """Ask what standard input says, and print the answer while it comes, without thinking.

    Raises ChatError.
    """
    try:
        question = sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise ChatError(f"standard input is not UTF-8: {error}") from None
    if not question.strip():
        raise ChatError("standard input is empty, so there is nothing to ask")
    conversation = Conversation(system)
    conversation.ask(question.rstrip("\n"))
    with client.ask(model, conversation.messages(), options) as chunks:
        pieces = Answer().pieces(chunks)
        print_pieces(piece for piece in pieces if not piece.thinking)
