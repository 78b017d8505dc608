"""Asks the server a question of the page, and gives the answer as the page shows it."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any

from lvllm.chat.answer import Answer
from lvllm.chat.client import ChatError, Client
from lvllm.chat.sampling import sampling, thinking
from lvllm.chat.thinking import Piece
from lvllm.top.scrape import Scrape, TopError, scrape
from lvllm.webui.messages import conversation, part

__all__ = ["Answering", "paths"]

SAMPLED = ("temperature", "top_p", "top_k", "max_tokens", "seed")
SHOW_SECONDS = 0.1
"""The page draws an answer anew with each piece, which takes longer the longer the answer is."""


class Answering:
    """Answers questions by the server of `client`. One object serves all visitors of the page."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._base = client.url.removesuffix("/v1")
        self._has_metrics = self._scrape() is not None

    async def answer(
        self,
        question: str | Mapping[str, Any],
        history: Sequence[Mapping[str, Any]],
        model: str,
        system: str,
        think: str,
        tools: str,
        *sampled: str,
    ) -> AsyncIterator[list[dict[str, Any]]]:
        """The parts of the answer so far, again and again. An error is the last part.

        `think` is "on", "off" or something else for neither. `tools` is JSON or empty. `sampled`
        are the values of SAMPLED; the server chooses the empty ones.
        """
        answer, shown = Answer(), _Shown()
        try:
            messages = conversation(history, question, system)
            options = sampling(dict(zip(SAMPLED, map(_number, SAMPLED, sampled), strict=True)))
            options |= thinking({"on": True, "off": False}.get(think)) | _tools(tools)
            before = await self._metrics()
            answer, drawn = Answer(), 0.0
            async with self._client.ask_async(model, messages, options) as chunks:
                async for chunk in chunks:
                    shown.add(answer.feed(chunk))
                    if time.monotonic() - drawn >= SHOW_SECONDS:
                        yield shown.parts(answer)
                        drawn = time.monotonic()
            shown.add(answer.finish())
            yield shown.parts(answer, ended=True, path=paths(before, await self._metrics()))
        except ChatError as error:
            yield [*shown.parts(answer, ended=True), part(f"⚠️ {error}", "error")]

    async def _metrics(self) -> Scrape | None:
        return await asyncio.to_thread(self._scrape) if self._has_metrics else None

    def _scrape(self) -> Scrape | None:
        try:
            return scrape(self._base)
        except TopError:
            return None


class _Shown:
    """An answer as parts for the page."""

    def __init__(self) -> None:
        self._thinking = ""
        self._text = ""

    def add(self, pieces: Iterable[Piece]) -> None:
        """Collect what is to be shown."""
        for piece in pieces:
            if piece.thinking:
                self._thinking += piece.text
            else:
                self._text += piece.text

    def parts(self, answer: Answer, ended: bool = False, path: str = "") -> list[dict[str, Any]]:
        """Thinking is open while it comes, and then folded."""
        found = []
        if self._thinking:
            status = "done" if ended or self._text or answer.calls else "pending"
            found.append(part(self._thinking, "thinking", title="Thinking", status=status))
        if self._text:
            found.append(part(self._text))
        for call in answer.calls.values():
            found.append(part(f"Calls `{call.name}`\n```json\n{call.arguments}\n```", "call"))
        numbers = [*answer.numbers(), path] if path else answer.numbers()
        if numbers:
            line = " · ".join(one.replace(" ", "\u00a0") for one in numbers)  # Breaks between them.
            found.append(part(f"<small>{line}</small>", "numbers"))
        return found


def _number(name: str, text: str) -> float | None:
    """The number in a field of the page; None if it is empty. Raises ChatError."""
    if not text.strip():
        return None
    kind, allowed = (
        (float, "a number") if name in ("temperature", "top_p") else (int, "a whole number")
    )
    try:
        return kind(text)
    except ValueError:
        raise ChatError(f"{name.replace('_', '-')} {text!r} is not allowed: {allowed}") from None


def _tools(text: str) -> dict[str, Any]:
    """The field of a request for tools. Raises ChatError."""
    if not text.strip():
        return {}
    try:
        tools = json.loads(text)
    except ValueError as error:
        raise ChatError(f"tools are not JSON: {error}") from None
    if not isinstance(tools, list):
        raise ChatError("tools are not allowed: a JSON list of functions in OpenAI's form")
    return {"tools": tools}


def paths(before: Scrape | None, after: Scrape | None) -> str:
    """Where the server computed experts meanwhile, by tokens: `path: CPU 64%, streamed 36%`."""
    if before is None or after is None:
        return ""
    name = "lvllm_expert_tokens_total"
    old = before.by("path", name=name)
    grown = {
        key: value - old.get((key,), 0) for (key,), value in after.by("path", name=name).items()
    }
    used = {"CPU" if key == "cpu" else key: value for key, value in grown.items() if value > 0}
    if len(used) > 1:
        total = sum(used.values())
        used_names = [f"{key} {value / total:.0%}" for key, value in used.items()]
    else:
        used_names = list(used)
    return f"path: {', '.join(used_names)}" if used_names else ""
