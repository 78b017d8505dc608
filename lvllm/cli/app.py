"""The commands of `lvllm`. Each is in a module of its own, which is imported when it is needed.

Most of them import PyTorch, which takes 2 s. And `lvllm doctor` works where the engine or vLLM does
not, and tells why the others fail.
"""

import importlib
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from lvllm import api_key

COMMANDS = {
    "bank": "lvllm.cli.bank:bank",
    "bench": "lvllm.cli.bench:bench",
    "chat": "lvllm.cli.chat:chat",
    "doctor": "lvllm.cli.doctor:doctor",
    "download": "lvllm.cli.download:download",
    "env": "lvllm.cli.env:env",
    "eval": "lvllm.cli.evaluate:evaluate",
    "export": "lvllm.cli.export:export",
    "plan": "lvllm.cli.plan:plan",
    "run": "lvllm.cli.run:run",
    "serve": "lvllm.cli.serve:serve",
    "top": "lvllm.cli.top:top",
    "tune": "lvllm.cli.tune:tune",
    "verify": "lvllm.cli.verify:verify",
    "webui": "lvllm.cli.webui:webui",
}
"""The function of each command, or its group of commands, by the name that the user types."""


class Commands(TyperGroup):
    """Looks commands up in `COMMANDS`."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        # After an unknown name, typer looks for similar ones among those that are loaded.
        for name in [cmd_name] if cmd_name in COMMANDS else COMMANDS:
            if name not in self.commands:
                self.add_command(_load(name), name)
        return self.commands.get(cmd_name)


def _load(name: str) -> Any:
    module, _, function = COMMANDS[name].partition(":")
    one = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    try:
        command = importlib.import_module(module)
        found = getattr(command, function)
        if isinstance(found, typer.Typer):
            return get_command(found)
        settings = getattr(command, "CONTEXT", None)
        one.command(name, context_settings=settings)(found)
    # ImportError: something is not installed. OSError: the engine's library does not load.
    except (ImportError, OSError) as error:
        anything = {"ignore_unknown_options": True}
        one.command(name, context_settings=anything)(_failing(name, error))
    return get_command(one)


def _failing(name: str, error: Exception) -> Callable[..., None]:
    """A command that takes any arguments and ends with one line."""
    said = " ".join(str(error).split())

    def fail(arguments: Annotated[list[str] | None, typer.Argument(hidden=True)] = None) -> None:
        """Does not start here: see `lvllm doctor`."""
        raise SystemExit(f"lvllm: {name} does not start: {said}; `lvllm doctor` says more")

    return fail


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback(help="LvLLM: MoE models larger than the GPU, served by vLLM (`lvllm serve MODEL`).")
def _group() -> None:
    """A group needs a function, even if it has nothing to do."""


def main() -> None:
    """The entry point of the console script."""
    api_key.hide()
    app()
