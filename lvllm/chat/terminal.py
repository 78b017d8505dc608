"""The chat as a person sees it: the prompt, the slash commands and the answers."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from lvllm.chat.answer import Answer
from lvllm.chat.client import ChatError, Client
from lvllm.chat.conversation import Conversation
from lvllm.chat.printing import note, print_pieces

__all__ = ["Terminal", "read_message"]

PROMPT, MORE = ">>> ", "... "
QUOTES = '"""'
HELP = '''\
/help          list the commands
/clear         forget the conversation
/system TEXT   set the system message; without TEXT there is none
/retry         ask the last message again
/save FILE     write the conversation as JSON messages
/quit          end the chat, as Ctrl-C or Ctrl-D at an empty prompt do
A line that ends with a backslash continues on the next line. What is between two lines of """ is
one message, in which a slash begins no command. Ctrl-C stops an answer.'''


def read_message(read_line: Callable[[str], str]) -> tuple[str, bool]:
    """Read one message by `read_line(prompt)`. Returns it, and whether it was between quotes."""
    lines = read_line(PROMPT).split("\n")  # A terminal can paste several lines at once.
    if lines[0].strip() == QUOTES:
        while len(lines) == 1 or lines[-1].strip() != QUOTES:
            lines += read_line(MORE).split("\n")
        return "\n".join(lines[1:-1]), True
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines += read_line(MORE).split("\n")
    return "\n".join(lines), False


class Terminal:
    """A chat with `model` of the server. `options` are fields of each request."""

    def __init__(self, client: Client, model: str, options: dict[str, Any], system: str) -> None:
        self._client = client
        self._model = model
        self._options = options
        self._conversation = Conversation(system)

    def run(self) -> None:
        """Chat until the user ends it."""
        read_line = _line_reader()
        note(f"{self._model} at {self._client.url}. /help lists the commands.")
        while True:
            try:
                message, quoted = read_message(read_line)
            except _Abandoned:
                continue
            except (KeyboardInterrupt, EOFError):
                return
            if message.startswith("/") and not quoted:
                name, _, argument = message.partition(" ")
                if name == "/quit":
                    return
                self._command(name, argument.strip())
            elif message.strip():
                self._conversation.ask(message)
                self._answer()

    def _command(self, name: str, argument: str) -> None:
        match name:
            case "/help":
                note(HELP)
            case "/clear":
                self._conversation.clear()
                note("The conversation is forgotten.")
            case "/system":
                self._conversation.system = argument
                note("The system message is set." if argument else "There is no system message.")
            case "/retry" if self._conversation.retry():
                self._answer()
            case "/retry":
                _error("/retry: nothing was asked yet")
            case "/save" if argument:
                self._save(Path(argument))
            case "/save":
                _error("/save needs the name of a file")
            case _:
                _error(f"{name} is no command; /help lists them")

    def _save(self, file: Path) -> None:
        try:
            self._conversation.save(file.expanduser())
        except (OSError, RuntimeError) as error:  # RuntimeError: ~name of an unknown user.
            _error(f"/save {file}: {getattr(error, 'strerror', error)}")
        else:
            note(f"The conversation is in {file}.")

    def _answer(self) -> None:
        """Ask the unanswered question. It stays unanswered if no answer comes."""
        answer = Answer()
        messages = self._conversation.messages()
        stopped = False
        try:
            with self._client.ask(self._model, messages, self._options) as chunks:
                print_pieces(answer.pieces(chunks))
        except ChatError as error:
            _error(f"{error} (your message is taken back; /retry sends it again)")
            return
        except KeyboardInterrupt:
            stopped = True
        if stopped and not answer.text:
            note("Stopped before the answer; your message is taken back, /retry sends it again.")
            return
        self._conversation.answer(answer.text)
        note(", ".join(["stopped"] * stopped + answer.numbers()))


class _Abandoned(Exception):
    """The user has given up a message that was begun."""


def _line_reader() -> Callable[[str], str]:
    """A function as input(), with a history and arrow keys where Python has readline.

    It raises _Abandoned instead of KeyboardInterrupt and EOFError if a message was begun.
    """
    typed: Callable[[], str] = str
    with contextlib.suppress(ImportError):
        import readline

        readline.parse_and_bind("set enable-bracketed-paste on")  # Pasted lines are one message.
        typed = readline.get_line_buffer

    def read_line(prompt: str) -> str:
        try:
            return input(prompt)
        except KeyboardInterrupt:
            typer.echo()
            if prompt == MORE or typed():
                raise _Abandoned from None
            raise
        except EOFError:
            typer.echo()
            if prompt == MORE:
                raise _Abandoned from None
            raise

    return read_line


def _error(text: str) -> None:
    typer.echo(f"lvllm: {text}", err=True)
