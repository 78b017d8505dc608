"""Arguments of the commands that start a server."""

import os
from collections.abc import Mapping
from typing import Annotated

import typer

__all__ = ["CONTEXT", "Arguments", "ExpertsPerToken", "Verify", "environment"]

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


def environment(verify: bool) -> Mapping[str, str]:
    """This process's environment for the server, which reads `--verify` from there."""
    return os.environ | ({"LVLLM_VERIFY": "1"} if verify else {})
