"""Turns what the page shows into OpenAI's messages.

The page's history is a list of gradio's messages. An answer is several of them: its thinking, its
tool calls, its text and a line of numbers. All but the text have a `kind` in their metadata.
"""

import base64
import mimetypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lvllm.chat.client import ChatError

__all__ = ["conversation", "kind", "part"]

Message = Mapping[str, Any]


def part(text: str, kind: str = "", **metadata: Any) -> dict[str, Any]:
    """A part of an answer as gradio's message; a `title` among its metadata folds it."""
    metadata = {"id": kind, **metadata} if kind else metadata
    return {"role": "assistant", "content": text, "metadata": metadata}


def kind(message: Message) -> str:
    """`thinking`, `call`, `numbers` or `error`; empty for text."""
    return str((message.get("metadata") or {}).get("id") or "")


def conversation(
    history: Sequence[Message], question: str | Message, system: str
) -> list[dict[str, Any]]:
    """OpenAI's messages for `question`, which is a text or gradio's `text` and `files`.

    A question without an answer is left out, and so is one whose answer broke off with an error.
    Raises ChatError for a file that is no picture or cannot be read.
    """
    messages: list[dict[str, Any]] = []
    if system.strip():
        messages.append({"role": "system", "content": system})
    for asked, answer in _exchanges(history):
        if answer and not any(kind(message) == "error" for message in answer):
            text = "".join(_text(message) for message in answer if not kind(message))
            messages += [
                {"role": "user", "content": _content(_text(asked), _files(asked))},
                {"role": "assistant", "content": text},
            ]
    if isinstance(question, str):
        content: Any = question
    else:
        content = _content(question.get("text") or "", question.get("files") or [])
    return [*messages, {"role": "user", "content": content}]


def _exchanges(history: Sequence[Message]) -> list[tuple[Message, list[Message]]]:
    """Each question with the parts of its answer."""
    found: list[tuple[Message, list[Message]]] = []
    for message in history:
        if message["role"] == "user":
            found.append((message, []))
        elif found:
            found[-1][1].append(message)
    return found


def _text(message: Message) -> str:
    return "".join(one["text"] for one in message["content"] if one["type"] == "text")


def _files(message: Message) -> list[Any]:
    return [one["file"] for one in message["content"] if one["type"] == "file"]


def _content(text: str, files: Sequence[Any]) -> str | list[dict[str, Any]]:
    """A question's content. Each file is a path, or has one under `path`."""
    if not files:
        return text
    paths = [Path(file["path"] if isinstance(file, Mapping) else file) for file in files]
    pictures = [{"type": "image_url", "image_url": {"url": _data_url(path)}} for path in paths]
    return [*pictures, {"type": "text", "text": text}] if text else pictures


def _data_url(file: Path) -> str:
    mime = mimetypes.guess_type(file.name)[0] or ""
    if not mime.startswith("image/"):
        raise ChatError(f"{file.name} is no picture")
    try:
        content = base64.b64encode(file.read_bytes()).decode()
    except OSError as error:
        raise ChatError(f"{file.name} cannot be read: {error.strerror}") from None
    return f"data:{mime};base64,{content}"
