"""A server for the time of a chat, as `lvllm run` and `lvllm webui` start it."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from lvllm.api_key import VARIABLE
from lvllm.cli.measuring import this_machine
from lvllm.serving import given
from lvllm.serving.background import free_port, running
from lvllm.serving.launch import prepare
from lvllm.serving.progress import LoadingLog, Weights

__all__ = ["started"]

HOST = "127.0.0.1"


@contextmanager
def started(
    words: Sequence[str],
    environ: Mapping[str, str],
    experts_per_token: int | None,
    console: Console,
    planned: Callable[[], None] = lambda: None,
    show: Callable[[Weights | None], None] = lambda weights: None,
) -> Iterator[tuple[str, str]]:
    """Run the server for arguments of `vllm serve`. Yields its URL and its key once it answers.

    The choices and the loading are shown on `console`.

    Args:
        planned: is called when the arguments are right, and the server is about to start.
        show: is told how much has been read, several times a second.

    Raises LvllmError.
    """
    launch = prepare(words, environ, this_machine, experts_per_token)
    options = given.read(words, environ).options
    host, port = str(options.get("host", HOST)), str(options.get("port", free_port()))
    launch = replace(launch, command=[*launch.command, "--port", port])
    for note in launch.notes:
        console.print(f"lvllm: {note}", markup=False, highlight=False, soft_wrap=True)
    log = Path(tempfile.mkdtemp(prefix="lvllm-run-")) / "server.log"
    console.print(f"lvllm: the server's log is {log}", markup=False, highlight=False)
    planned()
    local = HOST if host in ("0.0.0.0", "::") else host
    url = f"http://{local}:{port}"
    with ExitStack() as stack:
        with console.status("starting the server") as status:
            loading = LoadingLog(log)

            def say(line: str) -> None:
                show(loading.weights())
                status.update(f"starting the server: {escape(line[-100:])}")

            stack.enter_context(running(launch, url, log, say))
        yield f"{url}/v1", str(options.get("api-key") or environ.get(VARIABLE, ""))
