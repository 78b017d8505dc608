"""`lvllm chat` talks to an OpenAI-compatible server."""

import sys
from typing import Annotated, Any

import typer

from lvllm.chat.client import ChatError, Client
from lvllm.chat.pipe import answer_once
from lvllm.chat.printing import prepare_streams
from lvllm.chat.sampling import sampling, thinking
from lvllm.chat.terminal import Terminal

ApiKey = Annotated[
    str,
    typer.Option(
        help="The key that the server asks for.", envvar=["OPENAI_API_KEY", "VLLM_API_KEY"]
    ),
]
System = Annotated[str, typer.Option(help="The system message.")]
Think = Annotated[
    bool | None,
    typer.Option(
        "--think/--no-think",
        help="Switch thinking on or off, for models whose chat template can.",
        show_default=False,
    ),
]


def chat(
    url: Annotated[
        str, typer.Option(help="The server. If there is no path, /v1 is taken.")
    ] = "http://127.0.0.1:8000/v1",
    model: Annotated[
        str, typer.Option(help="The served name of a model.", show_default="the server's first")
    ] = "",
    api_key: ApiKey = "",
    system: System = "",
    temperature: Annotated[
        float | None, typer.Option(help="0 to 2; 0 always takes the most probable token.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Sample from the most probable tokens that have this share together."),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(help="Sample from this many of the most probable tokens; 0 or -1 for all."),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="The longest answer, in tokens.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed draws the same tokens.")] = None,
    think: Think = None,
) -> None:
    """Chat with a model of any OpenAI-compatible server.

    If standard input is no terminal, all of it is one question, and only the answer is printed.
    The server's own values hold for all that is not given. docs/chat.md lists keys and commands.
    """
    prepare_streams()
    try:
        given = {
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "max_tokens": max_tokens,
            "seed": seed,
        }
        options = sampling(given, prefix="--")
        options |= thinking(think)
        talk(url, model, api_key, system, options)
    except ChatError as error:
        raise SystemExit(f"lvllm: {error}") from None


def talk(url: str, model: str, api_key: str, system: str, options: dict[str, Any]) -> None:
    """Chat in a terminal, or answer what is on standard input. Raises ChatError.

    `options` are fields of each request; an empty `model` is the server's first one.
    """
    client = Client(url, api_key)
    name = model or client.models()[0]
    if sys.stdin.isatty():
        Terminal(client, name, options, system).run()
    else:
        answer_once(client, name, options, system)
