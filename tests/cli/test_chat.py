"""`lvllm chat` as it is run: in a terminal, and in a pipe."""

import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lvllm.cli.app import app
from tests.chat.fake_server import WAIT, Answer, FakeServer, serving
from tests.cli.pseudo_terminal import Terminal

KEYS = ("OPENAI_API_KEY", "VLLM_API_KEY")


def pipe(question: str | bytes, *arguments: str, **environment: str) -> tuple[int, str]:
    """Run `lvllm chat ARGUMENTS` with `question` in a pipe. Returns its exit code and output."""
    environ = dict.fromkeys(KEYS, "") | environment
    result = CliRunner().invoke(app, ["chat", *arguments], input=question, env=environ)
    return result.exit_code, result.output


@contextlib.contextmanager
def terminal(*arguments: str) -> Iterator[Terminal]:
    """A terminal in which `lvllm chat ARGUMENTS` shows its first prompt."""
    chat = Terminal("chat", *arguments, without=KEYS)
    try:
        chat.read_until(">>> ")
        yield chat
    finally:
        chat.close()


def test_a_chat_in_a_terminal(tmp_path: Path) -> None:
    answers = (
        Answer([{"reasoning": "hm"}, "fo", "ur"], tokens=3),
        Answer(["again "], ends="endless"),
        Answer(["fine"], tokens=None),
    )
    with serving(*answers) as server, terminal("--url", server.url, "--system", "S") as chat:
        chat.type("2 + 2?\n")
        shown = chat.read_until(">>> ")
        assert "\x1b[2mhm\x1b[0m\nfour\n" in shown
        rate = (
            r"(all after \d+ ms|[\d.]+ tokens/s)"  # The server is too fast, if nothing else runs.
        )
        assert re.search(rf"\x1b\[2m3 tokens, the first after \d+ ms, {rate}\x1b", shown)

        chat.type("go on\n")
        chat.read_until("again again ")
        chat.interrupt()
        assert re.search(r"\n\x1b\[2mstopped, the first after \d+ ms\x1b", chat.read_until(">>> "))
        assert server.client_left.wait(WAIT)

        chat.type('"""\nare\n/you\n"""\n')
        shown = chat.read_until("the first after")
        assert "fine\n" in shown
        assert "token" not in shown
        roles = [("system", "S"), ("user", "2 + 2?"), ("assistant", "four"), ("user", "go on")]
        sent = server.messages()
        assert sent[:4] == roles
        role, stopped = sent[4]
        assert role == "assistant"
        assert stopped.startswith("again again ")
        assert sent[5:] == [("user", "are\n/you")]

        file = tmp_path / "chat.json"
        chat.type(f"/save {file}\n")
        chat.read_until(">>> ")
        chat.read_until(">>> ")
        assert [said["content"] for said in json.loads(file.read_text())][-1] == "fine"
        chat.type("/quit\n")
        assert chat.exit_code() == 0


def test_a_failed_answer_is_taken_back_and_can_be_asked_again() -> None:
    answers = (
        Answer(["half"], ends="dead"),
        Answer(["whole"]),
        Answer(status=400, body={"error": {"message": "the context is too long"}}),
        Answer(ends="silent"),
        Answer(["other"]),
    )
    with serving(*answers) as server, terminal("--url", server.url) as chat:
        chat.type("first\\\nline\n")
        chat.read_until("... ")
        shown = chat.read_until(">>> ")
        assert re.search(r"half\nlvllm: .*broke off.*taken back.*\n>>> $", shown)
        chat.type("/retry\n")
        assert "whole\n" in chat.read_until(">>> ")
        assert server.messages() == [("user", "first\nline")]
        chat.type("long\n")
        assert re.search(r"\nlvllm: .*400: the context is too long", chat.read_until(">>> "))
        chat.type("never mind\n")
        while len(server.requests) < 4:
            time.sleep(0.01)
        chat.interrupt()
        assert "Stopped before the answer" in chat.read_until(">>> ")
        chat.type("next\n")
        assert "other\n" in chat.read_until(">>> ")
        assert [said for _, said in server.messages()] == ["first\nline", "whole", "next"]


def test_commands_and_keys() -> None:
    with (
        serving(Answer(["a"]), Answer(["b"])) as server,
        terminal("--url", server.url, "--model", "second") as chat,
    ):

        def typed(line: str) -> str:
            chat.type(line)
            return chat.read_until(">>> ")

        assert "/save FILE" in typed("/help\n")
        assert "lvllm: /nonsense is no command; /help lists them\n" in typed("/nonsense\n")
        assert "lvllm: /retry: nothing was asked yet\n" in typed("/retry\n")
        assert "lvllm: /save needs the name of a file\n" in typed("/save\n")
        assert "No such file or directory\n" in typed("/save /missing/file\n")
        typed("hello\n")
        typed("/clear\n")
        typed("/system Be brief.\n")
        typed("\n")  # Nothing is asked.
        typed("bye\n")
        assert server.messages() == [("system", "Be brief."), ("user", "bye")]
        assert server.requests[-1]["model"] == "second"
        chat.type("half a line")
        chat.read_until("line")
        chat.interrupt()  # This gives up the line, and the next one ends the chat.
        chat.read_until(">>> ")
        chat.interrupt()
        assert chat.exit_code() == 0


def test_ctrl_d_ends_a_chat() -> None:
    with serving() as server, terminal("--url", server.url) as chat:
        chat.type("\x04")
        assert chat.exit_code() == 0


def test_a_pipe_gets_the_answer_alone() -> None:
    answer = Answer([{"reasoning": "hm"}, "\n\nfo", "ur"])
    with serving(answer) as server:
        assert pipe("2 + 2?\n", "--url", server.url, "--system", "S") == (0, "four\n")
        assert server.messages() == [("system", "S"), ("user", "2 + 2?")]
        assert server.requests[0]["model"] == "first"
        assert set(server.requests[0]) == {"model", "messages", "stream", "stream_options"}


def test_settings_are_sent_if_they_are_given() -> None:
    given = ["--temperature", "0", "--top-p", "0.5", "--top-k", "-1", "--max-tokens", "7"]
    with serving(Answer(["a"])) as server:
        code, _ = pipe("x", "--url", server.url, *given, "--seed", "3", "--no-think")
        assert code == 0
        request = server.requests[0]
    sampling = {"temperature": 0, "top_p": 0.5, "top_k": -1, "max_tokens": 7, "seed": 3}
    assert request.items() >= sampling.items()
    assert request["chat_template_kwargs"] == {"enable_thinking": False}


@pytest.mark.parametrize(
    ("variables", "key"),
    [({"OPENAI_API_KEY": "a"}, "a"), ({"VLLM_API_KEY": "b"}, "b"), ({}, None)],
)
def test_the_key_comes_from_the_environment(variables: dict[str, str], key: str | None) -> None:
    with serving(Answer(["x"])) as server:
        assert pipe("x", "--url", server.url, **variables) == (0, "x\n")
        sent = [headers.get("Authorization") for headers in server.headers]
    assert sent == [key and f"Bearer {key}"] * 2


def failing(server: FakeServer, question: str | bytes, *arguments: str) -> str:
    """The one line in which a chat in a pipe fails."""
    code, output = pipe(question, "--url", server.url, *arguments)
    assert code == 1
    *_, line = output.splitlines()
    assert line.startswith("lvllm: ")
    return line


def test_a_pipe_fails_with_the_server() -> None:
    refusal = Answer(status=400, body={"error": {"message": "no"}})
    with serving(Answer(["half"], ends="dead"), refusal) as server:
        code, output = pipe("x", "--url", server.url)
        assert code == 1
        assert re.fullmatch(r"half\nlvllm: .*broke off.*\n", output)
        assert "answered with 400: no" in failing(server, "x")
    assert "no server answers at" in failing(server, "x")
    assert server.url in failing(server, "x")


@pytest.mark.parametrize(
    ("question", "arguments", "message"),
    [
        ("x", ["--temperature", "2.1"], "--temperature 2.1 is not allowed: 0 to 2"),
        ("x", ["--temperature", "nan"], "--temperature nan is not allowed"),
        ("x", ["--top-p", "0"], "--top-p 0.0 is not allowed: more than 0, at most 1"),
        ("x", ["--top-k", "-2"], "--top-k -2 is not allowed"),
        ("x", ["--max-tokens", "0"], "--max-tokens 0 is not allowed: at least 1"),
        ("x", ["--seed", str(2**63)], "--seed 9223372036854775808 is not allowed"),
        (" \n", [], "standard input is empty"),
        (b"\xff", [], "standard input is not UTF-8"),
    ],
)
def test_refusals_in_one_line(question: str | bytes, arguments: list[str], message: str) -> None:
    with serving() as server:
        assert message in failing(server, question, *arguments)
        assert not server.requests


def test_a_chat_starts_without_torch_and_vllm() -> None:
    code = (
        "import sys\nfrom lvllm.cli import main\ntry:\n    main()\n"
        "finally:\n    assert not {'torch', 'vllm', 'numpy'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, "chat", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=WAIT)
    assert result.returncode == 0, result.stderr
    assert "--no-think" in result.stdout
