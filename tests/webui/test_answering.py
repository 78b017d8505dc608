"""Answers as the page shows them."""

import asyncio
from typing import Any

import pytest

from lvllm.chat.client import Client
from lvllm.top.scrape import parse
from lvllm.webui.answering import Answering, paths
from lvllm.webui.messages import kind
from tests.chat.fake_server import Answer, FakeServer, serving


def ask(
    server: FakeServer, question: Any = "hello", think: str = "", tools: str = "", **sampled: str
) -> list[tuple[str, str]]:
    """Kind and text of the parts that are shown in the end."""

    async def last() -> list[dict[str, Any]]:
        names = ("temperature", "top_p", "top_k", "max_tokens", "seed")
        values = (sampled.get(name, "") for name in names)
        answering = Answering(Client(server.url))
        shown = answering.answer(question, [], "first", "", think, tools, *values)
        return [parts async for parts in shown][-1]

    return [(kind(one), one["content"]) for one in asyncio.run(last())]


def call(name: str, arguments: str) -> Any:
    return {"tool_calls": [{"index": 0, "function": {"name": name, "arguments": arguments}}]}


def test_every_part_of_an_answer() -> None:
    deltas = ["<think>h", "m</think>yes", call("find", '{"a"'), call("", ": 1}")]
    with serving(Answer(deltas, tokens=7, finish_reason="length")) as server:
        *parts, (last, numbers) = ask(server)
    assert parts == [
        ("thinking", "hm"),
        ("", "yes"),
        ("call", 'Calls `find`\n```json\n{"a": 1}\n```'),
    ]
    assert last == "numbers"
    numbers = numbers.replace("\u00a0", " ")
    assert numbers.startswith("<small>7 tokens · the first after ")
    assert "cut off at the limit of tokens" in numbers
    assert "path" not in numbers  # This server has no metrics.


def test_settings_are_sent_if_they_are_given() -> None:
    with serving(Answer(["a"]), Answer(["b"])) as server:
        ask(server)
        ask(server, think="off", tools='[{"type": "function"}]', temperature="0.5", seed=" 3")
        plain, given = server.requests
    assert set(plain) == {"model", "messages", "stream", "stream_options"}
    assert given["temperature"] == 0.5
    assert given["seed"] == 3
    assert given["tools"] == [{"type": "function"}]
    assert given["chat_template_kwargs"] == {"enable_thinking": False}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": "3"}, "temperature 3.0 is not allowed: 0 to 2"),
        ({"max_tokens": "1.5"}, "max-tokens '1.5' is not allowed: a whole number"),
        ({"top_p": "x"}, "top-p 'x' is not allowed: a number"),
        ({"tools": "{"}, "tools are not JSON"),
        ({"tools": "{}"}, "tools are not allowed: a JSON list"),
    ],
)
def test_refusals_in_one_line(given: dict[str, str], message: str) -> None:
    with serving() as server:
        ((of, text),) = ask(server, **given)
        assert not server.requests
    assert of == "error"
    assert message in text
    assert "\n" not in text


def test_a_broken_answer_keeps_what_came() -> None:
    with serving(Answer(["half"], ends="dead")) as server:
        shown = ask(server)
    assert shown[0] == ("", "half")
    assert shown[-1][0] == "error"
    assert "broke off before the end" in shown[-1][1]


def test_paths_by_tokens() -> None:
    def scraped(**tokens: int) -> Any:
        lines = (f'lvllm_expert_tokens_total{{path="{key}"}} {n}' for key, n in tokens.items())
        return parse("\n".join(lines) + "\n", 0.0)

    before = scraped(cpu=10, resident=5)
    assert paths(before, scraped(cpu=20, resident=5)) == "path: CPU"
    assert paths(before, scraped(cpu=11, resident=5, streamed=3)) == "path: CPU 25%, streamed 75%"
    assert paths(before, before) == ""
    assert paths(None, before) == ""
