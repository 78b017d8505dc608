"""The commands of `lvllm`. Each is in a module of its own."""

import typer

from lvllm.cli import env, evaluate, export

app = typer.Typer(
    help="LvLLM: MoE models larger than the GPU, served by vLLM (`vllm serve --config FILE`).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("env")(env.env)
app.command("eval")(evaluate.evaluate)
app.command("export")(export.export)


def main() -> None:
    """The entry point of the console script."""
    app()
