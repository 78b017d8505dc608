"""Serve the demo model, ask it one question, and show the answer and the engine that computed it.

    python examples/demo.py ["What is 47 + 38?"]

This starts `vllm serve --config config.yaml` on a free port with LvLLM enabled, waits until the
server answers, streams one chat completion, and stops the server whatever happens.
"""

import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from lvllm.chat.answer import Answer
from lvllm.chat.client import ChatError, Client
from lvllm.chat.printing import print_pieces
from lvllm.serving.background import ServerError, free_port, running
from lvllm.serving.launch import Launch

ROOT = Path(__file__).resolve().parents[1]
ENGINE_LINE = re.compile(
    r"LvLLM: experts on (?P<engine>\w+), (?P<isa>\w+), (?P<threads>\d+) threads on"
    r" (?P<nodes>\d+) NUMA node"
)
HOST = "127.0.0.1"

console = Console()


@contextmanager
def server(log: Path, *arguments: str, **environment: str) -> Iterator[str]:
    """Run `vllm serve` with LvLLM until the block ends. Yields its URL once it answers.

    Raises SystemExit with the end of the server's log if it ends instead.
    """
    vllm, port = Path(sys.executable).with_name("vllm"), free_port()
    command = [str(vllm), "serve", *arguments, "--host", HOST, "--port", str(port)]
    variables = os.environ | {"LVLLM_MOE_NUMA_ENABLED": "1"} | environment
    url = f"http://{HOST}:{port}"
    began = time.monotonic()
    with ExitStack() as stack:
        with console.status("") as status:

            def say(line: str) -> None:
                status.update(f"starting the server, {time.monotonic() - began:.0f} s")

            try:
                stack.enter_context(running(Launch(command, variables), url, log, say))
            except ServerError as error:
                raise SystemExit(f"demo: {error}") from None
        yield url


def ask(url: str, question: str) -> Answer:
    """Stream the answer to the terminal."""
    client = Client(f"{url}/v1")
    model = client.models()[0]
    console.print(f"\n[bold]you[/]    {question}\n[bold]model[/]  ", end="")
    answer = Answer()
    options = {"temperature": 0, "max_tokens": 128}
    with client.ask(model, [{"role": "user", "content": question}], options) as chunks:
        print_pieces(answer.pieces(chunks))
    console.print()
    if not answer.text:
        raise SystemExit("demo: the server answered without any text")
    return answer


def report(log: Path, answer: Answer) -> None:
    """Print what computed the answer, from a line of the server's log, and how fast."""
    ran = ENGINE_LINE.search(log.read_text(errors="replace"))
    if ran is None:
        raise SystemExit(f"demo: no layer was computed by LvLLM: {log}")
    table = Table(show_header=False)
    table.add_row("engine", ran["engine"])
    table.add_row("instruction set", ran["isa"])
    table.add_row("threads", ran["threads"])
    table.add_row("NUMA nodes", ran["nodes"])
    table.add_row("answer", ", ".join(answer.numbers()))
    console.print(table)


def main(question: Annotated[str, typer.Argument()] = "What is 47 + 38?") -> None:
    """Serve the demo model and ask it QUESTION."""
    os.chdir(ROOT)
    log = Path(tempfile.mkdtemp(prefix="lvllm-demo-")) / "server.log"
    console.print("starting the server: vllm serve --config config.yaml")
    started = time.monotonic()
    with server(log, "--config", "config.yaml") as url:
        console.print(f"server ready after {time.monotonic() - started:.0f} s, log {log}")
        try:
            answer = ask(url, question)
        except ChatError as error:
            raise SystemExit(f"demo: {error}") from None
        report(log, answer)
    console.print("server stopped")


if __name__ == "__main__":
    typer.run(main)
