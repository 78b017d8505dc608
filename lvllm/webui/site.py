"""The server of the page: it shows how a model is loaded, and then the chat, at one address."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import AsyncExitStack, contextmanager

import uvicorn
from starlette.applications import Starlette
from starlette.types import Receive, Scope, Send

from lvllm.errors import LvllmError
from lvllm.webui.headers import CHAT, LOADING, with_headers
from lvllm.webui.loading import Loading

__all__ = ["Site", "serving"]

LEAVE_SECONDS = 2
"""How long open connections have to end by themselves. Those of an open chat never do."""


class Site:
    """An ASGI application that is first `loading` and then a chat."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.loading = Loading()
        self._shown = with_headers(self.loading.app, LOADING)
        self._loop: Future[asyncio.AbstractEventLoop] = Future()
        self._chat = AsyncExitStack()

    def open(self, chat: Starlette) -> None:
        """Show `chat` from now on."""
        asyncio.run_coroutine_threadsafe(self._open(chat), self._loop.result()).result()
        self.loading.ready()

    async def _open(self, chat: Starlette) -> None:
        await self._chat.enter_async_context(chat.router.lifespan_context(chat))
        self._shown = with_headers(chat, CHAT)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await self._shown(scope, receive, send)
            return
        await receive()
        self._loop.set_result(asyncio.get_running_loop())
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._chat.aclose()
        await send({"type": "lifespan.shutdown.complete"})


@contextmanager
def serving(host: str, port: int) -> Iterator[Site]:
    """Serve a site until the block ends. An LvllmError of the block is shown before that.

    Port 0 stands for a free one. Raises LvllmError if the address cannot be taken.
    """
    listening = _listen(host, port)
    name = {"0.0.0.0": "localhost", "::": "localhost"}.get(host, host)
    port = listening.getsockname()[1]
    site = Site(f"http://{f'[{name}]' if ':' in name else name}:{port}/")
    config = uvicorn.Config(
        site,
        lifespan="on",
        log_config=None,
        log_level="critical",  # Without an error about the connections of an open chat.
        server_header=False,
        timeout_graceful_shutdown=LEAVE_SECONDS,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield site
    except LvllmError as error:
        site.loading.end(str(error))
        raise
    finally:
        site.loading.end("lvllm webui has ended")
        server.should_exit = True
        thread.join()


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises LvllmError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen()
        except OSError:
            listening.close()
            raise
    except OSError as error:
        raise LvllmError(f"--host {host} --port {port} cannot be taken: {error.strerror}") from None
    return listening
