"""`lvllm serve`: `vllm serve` with LvLLM switched on and settings for this machine."""

import os
import sys
from typing import Annotated

import typer

from lvllm.cli.measuring import this_machine
from lvllm.errors import LvllmError
from lvllm.serving.launch import prepare

CONTEXT = {"ignore_unknown_options": True}
"""How the command is parsed: what it does not know is an argument of `vllm serve`."""


Arguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[MODEL] [ARGUMENTS OF VLLM SERVE]...",
        help="A folder or an id on the hub comes first; without one, the demo model is served."
        " `vllm serve --help=all` lists the rest, among it --config FILE.",
    ),
]
ExpertsPerToken = Annotated[
    int | None,
    typer.Option(min=1, help="Take fewer experts for a token: faster, and worse answers."),
]


Verify = Annotated[
    bool,
    typer.Option(
        "--verify", help="Compare layers with float32 before the first request (20 s at most)."
    ),
]


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
        environ = os.environ | ({"LVLLM_VERIFY": "1"} if verify else {})
        launch = prepare(arguments or [], environ, this_machine, experts_per_token)
    except LvllmError as error:
        raise SystemExit(f"lvllm: {error}") from None
    for note in launch.notes:
        print(f"lvllm: {note}", file=sys.stderr)
    sys.stderr.flush()
    os.execvpe(launch.command[0], launch.command, launch.environment)
