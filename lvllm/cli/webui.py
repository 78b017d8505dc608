"""`lvllm webui`: a chat in the browser."""

import importlib.util
import os
import signal
import socket
from contextlib import ExitStack, suppress
from typing import Annotated

import typer
from rich.console import Console

from lvllm.api_key import VARIABLE
from lvllm.chat.client import LOOPBACK, Client
from lvllm.cli.chat import ApiKey, System
from lvllm.cli.serving_arguments import CONTEXT, Arguments, ExpertsPerToken, Verify, environment
from lvllm.errors import LvllmError

__all__ = ["CONTEXT", "webui"]


def webui(
    arguments: Arguments = None,
    url: Annotated[
        str, typer.Option(help="A server that runs already. If there is no path, /v1 is taken.")
    ] = "",
    host: Annotated[str, typer.Option(help="The address of the page.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port of the page.")] = 7860,
    api_key: ApiKey = "",
    system: System = "",
    experts_per_token: ExpertsPerToken = None,
    verify: Verify = False,
) -> None:
    """Chat in the browser with a model of any OpenAI-compatible server.

    Without --url a server is started as `lvllm run` does, and stopped in the end. Ctrl-C ends the
    page. It needs gradio, the extra `webui`.
    """
    console = Console(stderr=True)
    try:
        if importlib.util.find_spec("gradio") is None:
            raise LvllmError("webui needs gradio: pip install 'vllm[webui]' installs it")
        if url and (arguments or experts_per_token or verify):
            raise LvllmError(
                "--url names a server that runs already: MODEL, --experts-per-token, --verify and"
                " arguments of `vllm serve` are for a server that is started"
            )
        _check_address(host, port)
        with ExitStack() as stack:
            if not url:
                # In the environment the key is neither in the server's log nor in `ps`.
                key = {VARIABLE: api_key} if api_key else {}
                environ = {**environment(verify), **key}
                from lvllm.cli.server import started  # It imports PyTorch, which takes 2 s.

                words = arguments or []
                url, api_key = stack.enter_context(
                    started(words, environ, experts_per_token, console)
                )
            _show(Client(url, api_key), host, port, system, console)
    except LvllmError as error:
        raise SystemExit(f"lvllm: {error}") from None


def _show(client: Client, host: str, port: int, system: str, console: Console) -> None:
    """Show the page until Ctrl-C. Raises LvllmError."""
    models = client.models()
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from lvllm.webui.answering import Answering
    from lvllm.webui.page import page, shown

    with shown(page(Answering(client), models, system), host, port) as address:
        said = f"lvllm: {models[0]} at {address} (Ctrl-C ends it)"
        console.print(said, markup=False, highlight=False, soft_wrap=True)
        if host not in LOOPBACK:
            console.print("lvllm: everybody who reaches this address can chat", highlight=False)
        with suppress(KeyboardInterrupt):
            signal.pause()
        console.print("lvllm: stopping")


def _check_address(host: str, port: int) -> None:
    """Raises LvllmError if the page cannot listen there."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise LvllmError(f"--host {host} --port {port} cannot be taken: {error.strerror}") from None
