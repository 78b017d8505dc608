"""Asks an OpenAI-compatible server, and yields its answer while it comes."""

import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from lvllm.errors import LvllmError
from lvllm.loopback import is_here

__all__ = ["Call", "ChatError", "Chunk", "Client"]

CONNECT_SECONDS = 10.0
SILENT_SECONDS = 1800.0
"""How long a server may say nothing: a prompt of 128 Ki tokens can take a CPU ten minutes."""
START = "`lvllm serve` starts one"


class ChatError(LvllmError):
    """A question that was not answered to its end; the message is one line for the user."""


@dataclass(frozen=True)
class Call:
    """A piece of a tool call: which of the answer's calls it belongs to, and what it adds."""

    index: int
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True)
class Chunk:
    """A piece of an answer. Any of its parts may be missing."""

    text: str = ""
    thinking: str = ""
    calls: tuple[Call, ...] = ()
    finish_reason: str | None = None
    tokens: int | None = None
    """How many tokens the answer has so far, thinking included."""
    at: float = 0.0
    """When it was there, by `time.monotonic()`."""
    waited: float = 0.0
    """How many seconds the client waited for it; 0 if it came together with the chunk before."""


class Client:
    """A server at `url`, which ends with /v1 as a rule; `api_key` is never part of a message.

    Raises ChatError if `url` is none, or if `api_key` cannot be in a header.
    """

    def __init__(self, url: str, api_key: str = "") -> None:
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL:
            parsed = httpx.URL()
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ChatError(f"--url {url!r} is not allowed: http://HOST:PORT/v1")
        if not (api_key.isascii() and api_key.isprintable()) or " " in api_key:
            raise ChatError("--api-key is not allowed: ASCII characters without spaces")
        self.url = (url if parsed.path.strip("/") else f"{parsed.copy_with(path='/v1')}").rstrip(
            "/"
        )
        self._key = api_key
        self._connection: dict[str, Any] = {
            "headers": {"Authorization": f"Bearer {api_key}"} if api_key else None,
            "timeout": httpx.Timeout(SILENT_SECONDS, connect=CONNECT_SECONDS),
            # Servers close idle connections after seconds, perhaps while a question is sent.
            "limits": httpx.Limits(max_keepalive_connections=0),
            "trust_env": not is_here(url),
        }
        try:
            self._http = httpx.Client(**self._connection)
        except (ImportError, ValueError) as error:
            raise ChatError(f"the environment's proxy cannot be used: {error}") from None

    def models(self) -> list[str]:
        """The names of the server's models, at least one. Raises ChatError."""
        with self._errors():
            answer = self._http.get(f"{self.url}/models", timeout=CONNECT_SECONDS)
            self._check(answer)
            try:
                names = [str(model["id"]) for model in answer.json()["data"]]
            except (ValueError, LookupError, TypeError):
                names = []
        if not names:
            raise ChatError(f"{self.url}/models names no model: give one by --model")
        return names

    @contextmanager
    def ask(
        self, model: str, messages: list[dict[str, Any]], options: dict[str, Any]
    ) -> Iterator[Iterator[Chunk]]:
        """Send `messages`, and give the chunks of the answer while they come.

        `options` are further fields of the request. Leaving the context closes the connection, and
        the server then stops. Raises ChatError, also between chunks.
        """
        question = self._question(model, messages, options)
        with self._errors(), self._http.stream(**question) as response:
            if response.status_code != 200:
                response.read()
            self._check(response)
            yield self._chunks(response)

    @asynccontextmanager
    async def ask_async(
        self, model: str, messages: list[dict[str, Any]], options: dict[str, Any]
    ) -> AsyncIterator[AsyncIterator[Chunk]]:
        """As `ask`, in an event loop, where a task that waits for a chunk can be cancelled."""
        question = self._question(model, messages, options)
        with self._errors():
            async with (
                httpx.AsyncClient(**self._connection) as http,
                http.stream(**question) as response,
            ):
                if response.status_code != 200:
                    await response.aread()
                self._check(response)
                yield self._chunks_async(response)

    def _question(
        self, model: str, messages: list[dict[str, Any]], options: dict[str, Any]
    ) -> dict[str, Any]:
        """The request as httpx's arguments."""
        body = {
            "model": model,
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
            **options,
        }
        return {
            "method": "POST",
            "url": f"{self.url}/chat/completions",
            # Python writes this JSON in ASCII, so that half of a surrogate pair does no harm.
            "content": json.dumps(body),
            "headers": {"Content-Type": "application/json"},
        }

    def _chunks(self, response: httpx.Response) -> Iterator[Chunk]:
        events = _Events()
        for part in response.iter_bytes():
            yield from self._read(events, part)
        self._check_end(events)

    async def _chunks_async(self, response: httpx.Response) -> AsyncIterator[Chunk]:
        events = _Events()
        async for part in response.aiter_bytes():
            for chunk in self._read(events, part):
                yield chunk
        self._check_end(events)

    def _read(self, events: "_Events", part: bytes) -> Iterator[Chunk]:
        at = time.monotonic()
        waited = at - events.asked
        for data in events.feed(part):
            try:
                event = json.loads(data)
                chunk = None if event.get("error") else _chunk(event, at, waited)
            except (ValueError, AttributeError, LookupError, TypeError):
                raise ChatError(f"{self.url} sent what is no chunk of an answer") from None
            if chunk is None:
                raise ChatError(self._said(f"{self.url} gave the answer up: {_message(event)}"))
            events.finished = events.finished or chunk.finish_reason is not None
            yield chunk
            waited = 0.0
        events.asked = time.monotonic()

    def _check_end(self, events: "_Events") -> None:
        if not events.finished:
            raise ChatError(f"{self.url} broke off before the end of its answer")

    def _check(self, response: httpx.Response) -> None:
        """Raises ChatError, with the server's message if it was read, unless the status is 200."""
        if response.status_code == 200:
            return
        try:
            message = _message(response.json())
        except ValueError:
            message = ""
        message = message or response.reason_phrase
        if response.status_code == 401:
            message += " (--api-key gives the key)"
        raise ChatError(
            self._said(f"{response.url} answered with {response.status_code}: {message}")
        )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn httpx's errors into a ChatError."""
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise ChatError(f"no server answers at {self.url} ({error}): {START}") from None
        except (httpx.ReadError, httpx.RemoteProtocolError):
            raise ChatError(f"{self.url} broke off before the end of its answer") from None
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise ChatError(self._said(f"the connection to {self.url} broke: {reason}")) from None

    def _said(self, text: str) -> str:
        """`text` as one line, without the key."""
        line = " ".join(text.split())
        return line.replace(self._key, "(the key)") if self._key else line


class _Events:
    """Takes the bytes of a stream of events, wherever they are cut."""

    def __init__(self) -> None:
        self.finished = False
        """Whether the answer is complete."""
        self.asked = time.monotonic()
        """Since when the client has waited for more, by `time.monotonic()`."""
        self._rest = b""
        self._done = False

    def feed(self, part: bytes) -> Iterator[str]:
        """The data of the events that are complete after `part`."""
        # Only a line feed ends a line: JSON may contain U+2028 and U+0085.
        *lines, self._rest = (self._rest + part).split(b"\n")
        for line in lines:
            field, _, data = line.decode(errors="replace").partition(":")
            if field != "data" or self._done:  # An empty line or a comment.
                continue
            if data.strip() == "[DONE]":
                self.finished = self._done = True
            else:
                yield data


def _chunk(event: dict[str, Any], at: float, waited: float) -> Chunk:
    """What an event of the stream says, with the times of its arrival."""
    choice = (event.get("choices") or [{}])[0]
    delta = choice.get("delta") or {}
    usage = event.get("usage") or {}
    return Chunk(
        text=delta.get("content") or "",
        # Servers call it by either name. Some send both, with the same text.
        thinking=delta.get("reasoning") or delta.get("reasoning_content") or "",
        calls=tuple(map(_call, delta.get("tool_calls") or ())),
        finish_reason=choice.get("finish_reason"),
        tokens=usage.get("completion_tokens"),
        at=at,
        waited=waited,
    )


def _call(delta: dict[str, Any]) -> Call:
    function = delta.get("function") or {}
    index, name, arguments = delta.get("index"), function.get("name"), function.get("arguments")
    return Call(int(index or 0), name or "", arguments or "")


def _message(body: Any) -> str:
    """The message of an error: OpenAI's `error`, or what other servers send instead."""
    for name in ("error", "message", "detail"):
        if isinstance(body, dict) and body.get(name):
            return _message(body[name])
    return str(body or "")
