"""`lvllm run`: serve a model and chat with it in one terminal."""

from rich.console import Console

from lvllm.chat.sampling import thinking
from lvllm.cli.chat import System, Think, talk
from lvllm.cli.server import started
from lvllm.cli.serving_arguments import CONTEXT, Arguments, ExpertsPerToken, Verify, environment
from lvllm.errors import LvllmError

__all__ = ["CONTEXT", "run"]


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
    console = Console(stderr=True)
    environ = environment(verify)
    try:
        with started(arguments or [], environ, experts_per_token, console) as (url, key):
            talk(url, "", key, system, thinking(think))
            console.print("lvllm: stopping the server")
    except LvllmError as error:
        raise SystemExit(f"lvllm: {error}") from None
