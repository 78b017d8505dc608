"""The page before the chat: it shows how a model is loaded, or why it cannot be."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, StreamingResponse
from starlette.routing import Route

from lvllm.serving.progress import Weights

__all__ = ["Loading"]

FILES = {"/": "page.html", "/loading.css": "page.css", "/loading.js": "page.js"}
FOLDER = Path(__file__).parent
OVER = ("ready", "failed")
LOOK_SECONDS = 0.2
"""How often a page that is open is told what is new."""


class Loading:
    """What the page says. Any thread may change it, and `app` shows it to all who look."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._said: dict[str, Any] = {"state": "starting", "text": "Starting the server"}
        routes = [Route(path, self._file) for path in FILES]
        self.app = Starlette(routes=[*routes, Route("/progress", self._progress)])

    def show(self, weights: Weights | None) -> None:
        """Say how much has been read."""
        if weights is None:
            return
        if weights.percent < 100:
            text = f"Loading the weights: {weights.read} of {weights.total}"
        else:
            text = f"All weights are loaded ({weights.total}): vLLM prepares to serve"
        self._said = {"state": "loading", "text": text, "percent": weights.percent}

    def ready(self) -> None:
        """Have the page replaced by the chat."""
        self._said = {"state": "ready", "text": "Opening the chat"}

    def end(self, why: str) -> None:
        """Say why there is no chat, unless there is one or another reason was said."""
        if self._said["state"] not in OVER:
            self._said = {"state": "failed", "text": why}

    @staticmethod
    async def _file(request: Request) -> FileResponse:
        return FileResponse(FOLDER / FILES[request.url.path])

    async def _progress(self, request: Request) -> StreamingResponse:
        return StreamingResponse(self._events(), media_type="text/event-stream")

    async def _events(self) -> AsyncIterator[str]:
        """What is said, as an event whenever it changes, until it is over."""
        told: dict[str, Any] | None = None
        while told is None or told["state"] not in OVER:
            if told is self._said:
                await asyncio.sleep(LOOK_SECONDS)
                continue
            told = self._said
            seconds = time.monotonic() - self._began
            yield f"data: {json.dumps({**told, 'seconds': seconds})}\n\n"
