"""`lvllm serve`: `vllm serve` with LvLLM switched on and settings for this machine."""

import os
import sys

from lvllm.cli.measuring import this_machine
from lvllm.cli.serving_arguments import CONTEXT, Arguments, ExpertsPerToken, Verify, environment
from lvllm.errors import LvllmError
from lvllm.serving.launch import prepare

__all__ = ["CONTEXT", "serve"]


def serve(
    arguments: Arguments = None,
    experts_per_token: ExpertsPerToken = None,
    verify: Verify = False,
) -> None:
    """Serve a model: `vllm serve` with LvLLM switched on, and with settings for this machine.

    A plan chooses what is not given in arguments, in the file of --config or in the environment.
    Each choice is printed with its reason. `lvllm plan MODEL` says more about it.
    """
    try:
        environ = environment(verify)
        launch = prepare(arguments or [], environ, this_machine, experts_per_token)
    except LvllmError as error:
        raise SystemExit(f"lvllm: {error}") from None
    for note in launch.notes:
        print(f"lvllm: {note}", file=sys.stderr)
    sys.stderr.flush()
    os.execvpe(launch.command[0], launch.command, launch.environment)
