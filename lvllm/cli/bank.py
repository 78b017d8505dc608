"""`lvllm bank`: hold the experts of a model in memory, for servers that come and go."""

import json
import os
import select
import signal
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from lvllm import api_key
from lvllm.bank.run import run
from lvllm.errors import LvllmError
from lvllm.handover.banks import Bank, banks
from lvllm.serving import given
from lvllm.units import amount

__all__ = ["bank"]

HOLD = "hold"
"""The command for words that name no other one."""
END_SECONDS = 60
"""How long a bank may take to end. One that loads waits 20 s for its loader."""

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class HoldOrCommand(TyperGroup):
    """Takes a model, and whatever else `vllm serve` takes, where other groups want a command."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help"):
            args = [HOLD, *args]
        return super().parse_args(ctx, args)


bank = typer.Typer(
    name="bank",
    cls=HoldOrCommand,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Hold the experts of a model in memory: `lvllm bank MODEL [ARGUMENTS OF VLLM SERVE]...`."
    " Servers with LVLLM_SHARE_EXPERTS=1 use them, and start again without loading them.",
)


@bank.command(HOLD, context_settings={"ignore_unknown_options": True})
def hold(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL] [ARGUMENTS OF VLLM SERVE]...",
            help="What the servers get, among it --config FILE. What does not concern the experts"
            " is ignored.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a line of JSON after each layer and state.")
    ] = False,
) -> None:
    """Load the experts of a model, and hold them until Ctrl+C, SIGTERM or `lvllm bank stop`.

    `lvllm bank MODEL` is short for this. The exit code is 1 if the experts could not be loaded.
    """
    begin = time.monotonic()
    words, _ = api_key.split(arguments or [])  # A bank answers no requests over HTTP.

    def show(status: Bank) -> None:
        if as_json:
            print(status.model_dump_json(), flush=True)
        elif status.state == "ready":
            print(
                f"lvllm: ready after {time.monotonic() - begin:.0f} s: {_size(status)} of experts"
                f" ({', '.join(status.formats)}) for servers with LVLLM_SHARE_EXPERTS=1",
                flush=True,
            )

    try:
        model = given.read(words, os.environ).model
        if model is None:
            raise LvllmError("which model? `lvllm bank MODEL` takes a folder or an id on the hub")
        last = run(_absolute(model), words, os.environ, show)
    except LvllmError as error:
        if as_json:
            print(json.dumps({"state": "failed", "error": str(error)}), flush=True)
        raise SystemExit(f"lvllm: {error}") from None
    if as_json:
        print(json.dumps({"state": "stopped"}), flush=True)
    elif last.attached:
        print(f"lvllm: stopped; processes {_pids(last)} keep the memory until they end")


@bank.command("list")
def list_banks(as_json: AsJson = False) -> None:
    """List all banks of this user on this host."""
    found = _banks()
    if as_json:
        print(json.dumps([one.model_dump() for one in found], indent=2))
        return
    if not found:
        print("no bank of this user runs here")
        return
    table = Table("model", "state", "size", "format", "attached", "process", "up")
    table.columns[0].overflow = "fold"
    for one in found:
        minutes = int(time.time() - one.started) // 60
        formats = ", ".join(one.formats)
        up = f"{minutes // 60}:{minutes % 60:02} h"
        table.add_row(
            one.model, one.state, _size(one), formats, _pids(one) or "none", str(one.pid), up
        )
    Console().print(table)


@bank.command("stop")
def stop(
    model: Annotated[
        str | None, typer.Argument(help="Its model; may be left out if there is one bank.")
    ] = None,
) -> None:
    """Stop a bank. The memory goes once the last server that uses it has ended, too."""
    found = _banks()
    chosen = [one for one in found if model is None or _same(one.model, model)]
    if len(chosen) != 1:
        held = ", ".join(f"{one.model} (process {one.pid})" for one in found) or "none"
        what = "no bank" if not chosen else f"{len(chosen)} banks"
        raise SystemExit(f"lvllm: {what} of {model or 'any model'}: the banks here are {held}")
    (one,) = chosen
    try:
        process = os.pidfd_open(one.pid)
        signal.pidfd_send_signal(process, signal.SIGTERM)
    except ProcessLookupError:
        return  # It has just ended.
    if not select.select([process], [], [], END_SECONDS)[0]:
        raise SystemExit(f"lvllm: process {one.pid} has not ended for {END_SECONDS} s")
    users = f"; processes {_pids(one)} keep the memory until they end" if one.attached else ""
    print(f"lvllm: the bank of {one.model} has ended{users}")


def _banks() -> list[Bank]:
    try:
        return banks()
    except LvllmError as error:
        raise SystemExit(f"lvllm: {error}") from None


def _same(one: str, other: str) -> bool:
    """Whether a bank of the model `one` is what `other` names."""
    return one in (other, _absolute(other))


def _absolute(model: str) -> str:
    """The whole path of a folder or a GGUF file; an id on a hub as it is."""
    path = Path(model).expanduser()
    return str(path.resolve()) if path.exists() else model


def _size(one: Bank) -> str:
    return f"{amount(one.bytes)} in {one.layers} layers"


def _pids(one: Bank) -> str:
    return ", ".join(map(str, one.attached))
