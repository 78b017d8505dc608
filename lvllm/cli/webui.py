"""`lvllm webui`: a chat in the browser."""

import importlib.util
import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from lvllm.api_key import VARIABLE
from lvllm.chat.client import Client
from lvllm.cli.chat import ApiKey, System
from lvllm.cli.serving_arguments import CONTEXT, Arguments, ExpertsPerToken, Verify, environment
from lvllm.errors import LvllmError
from lvllm.loopback import LOOPBACK
from lvllm.machine.installation import name_of_lvllm

if TYPE_CHECKING:
    from lvllm.webui.site import Site

__all__ = ["CONTEXT", "webui"]


def webui(
    arguments: Arguments = None,
    url: Annotated[
        str, typer.Option(help="A server that runs already. If there is no path, /v1 is taken.")
    ] = "",
    host: Annotated[str, typer.Option(help="The address of the page.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="The port of the page; 0 takes a free one.")
    ] = 7860,
    api_key: ApiKey = "",
    system: System = "",
    experts_per_token: ExpertsPerToken = None,
    verify: Verify = False,
) -> None:
    """Chat in the browser with a model of any OpenAI-compatible server.

    Without --url a server is started as `lvllm run` does, and stopped in the end. Ctrl-C or SIGTERM
    ends the page. It needs gradio, the extra `webui`.
    """
    console = Console(stderr=True)
    try:
        if importlib.util.find_spec("gradio") is None:
            extra = f"{name_of_lvllm()}[webui]"
            raise LvllmError(f"webui needs gradio: pip install '{extra}' installs it")
        if url and (arguments or experts_per_token or verify):
            raise LvllmError(
                "--url names a server that runs already: MODEL, --experts-per-token, --verify and"
                " arguments of `vllm serve` are for a server that is started"
            )
        from lvllm.webui.site import serving

        with (
            _until_interrupted(),
            _private_pictures(),
            serving(host, port) as site,
            ExitStack() as stack,
        ):
            if not url:
                # In the environment the key is neither in the server's log nor in `ps`.
                key = {VARIABLE: api_key} if api_key else {}
                environ = {**environment(verify), **key}
                from lvllm.cli.server import started  # It imports PyTorch, which takes 2 s.

                def planned() -> None:
                    _say(console, f"{site.url} shows the loading, and then the chat")

                words, show = arguments or [], site.loading.show
                url, api_key = stack.enter_context(
                    started(words, environ, experts_per_token, console, planned, show)
                )
            _chat(site, Client(url, api_key), host, system, console)
    except LvllmError as error:
        raise SystemExit(f"lvllm: {error}") from None


@contextmanager
def _until_interrupted() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the block alone, so that what it has made is removed."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with suppress(KeyboardInterrupt):
            yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _private_pictures() -> Iterator[None]:
    """Let gradio keep uploaded pictures in a folder that only this user can open, until the end.

    Otherwise all users of the host have their pictures in /tmp/gradio, which is the first one's.
    """
    with tempfile.TemporaryDirectory(prefix="lvllm-webui-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # gradio reads it when it is imported.
        yield


def _chat(site: "Site", client: Client, host: str, system: str, console: Console) -> None:
    """Show the chat until Ctrl-C or SIGTERM. Raises LvllmError."""
    models = client.models()
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from lvllm.webui.answering import Answering
    from lvllm.webui.page import application, page

    site.open(application(page(Answering(client), models, system)))
    _say(console, f"{models[0]} at {site.url} (Ctrl-C ends it)")
    if host not in LOOPBACK:
        _say(console, "everybody who reaches this address can chat")
    with suppress(KeyboardInterrupt):
        signal.pause()
    _say(console, "stopping")


def _say(console: Console, text: str) -> None:
    console.print(f"lvllm: {text}", markup=False, highlight=False, soft_wrap=True)
