"""`lvllm chat` talks to an OpenAI-compatible server."""

import sys
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from lvllm.chat.client import ChatError, Client
from lvllm.chat.pipe import answer_once
from lvllm.chat.printing import prepare_streams
from lvllm.chat.terminal import Terminal

ALLOWED: Mapping[str, tuple[str, Callable[[float], bool]]] = {
    "temperature": ("0 to 2", lambda value: 0 <= value <= 2),
    "top_p": ("more than 0, at most 1", lambda value: 0 < value <= 1),
    "top_k": ("-1, 0 or more", lambda value: value >= -1),
    "max_tokens": ("at least 1", lambda value: value >= 1),
    "seed": ("a whole number of 64 bits", lambda value: -(2**63) <= value < 2**63),
}
"""The values that each sampling setting allows."""
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
    api_key: Annotated[
        str,
        typer.Option(
            help="The key that the server asks for.", envvar=["OPENAI_API_KEY", "VLLM_API_KEY"]
        ),
    ] = "",
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
        options = _sampling(
            temperature=temperature, top_p=top_p, top_k=top_k, max_tokens=max_tokens, seed=seed
        )
        options |= thinking(think)
        talk(url, model, api_key, system, options)
    except ChatError as error:
        raise SystemExit(f"lvllm: {error}") from None


def thinking(think: bool | None) -> dict[str, Any]:
    """The field of a request that switches thinking on or off; none if `think` is None."""
    return {} if think is None else {"chat_template_kwargs": {"enable_thinking": think}}


def talk(url: str, model: str, api_key: str, system: str, options: dict[str, Any]) -> None:
    """Chat in a terminal, or answer what is on standard input. Raises ChatError.

    `options` are fields of each request; an empty `model` is the server's first one.
    """
    client = Client(url, api_key)
    name = model or client.first_model()
    if sys.stdin.isatty():
        Terminal(client, name, options, system).run()
    else:
        answer_once(client, name, options, system)


def _sampling(**given: float | None) -> dict[str, Any]:
    """The settings that were given, as fields of a request. Raises ChatError."""
    for name, value in given.items():
        values, allows = ALLOWED[name]
        if value is not None and not allows(value):
            option = name.replace("_", "-")
            raise ChatError(f"--{option} {value} is not allowed: {values}")
    return {name: value for name, value in given.items() if value is not None}
