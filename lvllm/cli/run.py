"""`lvllm run`: serve a model and chat with it in one terminal."""

import os
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from lvllm.cli.chat import System, Think, talk, thinking
from lvllm.cli.measuring import this_machine
from lvllm.cli.serve import CONTEXT, Arguments, ExpertsPerToken, Verify
from lvllm.errors import LvllmError
from lvllm.serving import given
from lvllm.serving.background import free_port, running
from lvllm.serving.launch import prepare

__all__ = ["CONTEXT", "run"]

HOST = "127.0.0.1"


def run(
    arguments: Arguments = None,
    experts_per_token: ExpertsPerToken = None,
    verify: Verify = False,
    system: System = "",
    think: Think = None,
) -> None:
    """Serve a model as `lvllm serve` does, chat with it here, and stop the server in the end.

    The server takes a free port and requests from this machine only, unless --port or --host say
    otherwise. Its log is in a file, which is named when it starts.
    """
    words = arguments or []
    console = Console(stderr=True)
    try:
        environ = os.environ | ({"LVLLM_VERIFY": "1"} if verify else {})
        launch = prepare(words, environ, this_machine, experts_per_token)
        options = given.read(words, environ).options
        host, port = str(options.get("host", HOST)), str(options.get("port", free_port()))
        launch = replace(launch, command=[*launch.command, "--host", host, "--port", port])
        for note in launch.notes:
            console.print(f"lvllm: {note}", markup=False, highlight=False, soft_wrap=True)
        log = Path(tempfile.mkdtemp(prefix="lvllm-run-")) / "server.log"
        console.print(f"lvllm: the server's log is {log}", markup=False, highlight=False)
        local = HOST if host in ("0.0.0.0", "::") else host
        url = f"http://{local}:{port}"
        with ExitStack() as stack:
            with console.status("starting the server") as status:

                def say(line: str) -> None:
                    status.update(f"starting the server: {escape(line[-100:])}")

                stack.enter_context(running(launch, url, log, say))
            talk(f"{url}/v1", "", str(options.get("api-key", "")), system, thinking(think))
            console.print("lvllm: stopping the server")
    except LvllmError as error:
        raise SystemExit(f"lvllm: {error}") from None
