"""The client against a server that answers, refuses, dies and says nothing."""

import time
from typing import Any

import pytest

from lvllm.chat.answer import Answer
from lvllm.chat.client import ChatError, Client
from tests.chat import fake_server
from tests.chat.fake_server import FakeServer, serving

HELLO = [{"role": "user", "content": "hello"}]


def ask(server: FakeServer, key: str = "", **options: Any) -> tuple[Answer, str, str]:
    """Ask `server`. Returns the answer, and all thinking and all text that was to be shown."""
    answer = Answer()
    with Client(server.url, key).ask("first", HELLO, options) as chunks:
        pieces = list(answer.pieces(chunks))
    thinking = "".join(piece.text for piece in pieces if piece.thinking)
    return answer, thinking, "".join(piece.text for piece in pieces if not piece.thinking)


def test_an_answer_with_thinking_and_usage() -> None:
    # Some servers send the same thinking by both names.
    deltas: list[Any] = [
        {"reasoning": "h", "reasoning_content": "h"},
        {"reasoning_content": "m"},
        "a\u2028b\u0085",
        "c",
    ]
    with serving(fake_server.Answer(deltas, tokens=4, finish_reason="length")) as server:
        answer, thinking, shown = ask(server, key="secret", temperature=0.5)
        request = server.requests[0]
    assert (thinking, shown, answer.text) == ("hm", "a\u2028b\u0085c", "a\u2028b\u0085c")
    assert answer.tokens == 4
    assert answer.cut_off
    assert answer.first_token_ms is not None
    assert answer.last_token_ms is not None
    assert answer.last_token_ms >= answer.first_token_ms > 0
    assert request == {
        "model": "first",
        "messages": HELLO,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.5,
    }
    assert server.headers[0]["Authorization"] == "Bearer secret"


def test_think_tags_are_no_part_of_the_answer() -> None:
    with serving(fake_server.Answer(["<th", "ink>hm</thi", "nk>\n\nyes"])) as server:
        answer, thinking, _ = ask(server)
    assert (thinking, answer.text) == ("hm", "yes")


def test_without_usage_no_rate_is_known() -> None:
    with serving(fake_server.Answer(["a", "b"], tokens=None)) as server:
        answer, _, _ = ask(server)
    assert answer.tokens is None
    assert answer.tokens_per_second is None
    assert not answer.cut_off


def test_chunks_say_how_long_they_were_waited_for() -> None:
    with serving(fake_server.Answer(["a", "b", "c"], pause=0.05)) as server:
        asked = time.monotonic()
        with Client(server.url).ask("first", HELLO, {}) as chunks:
            found = list(chunks)
    times = [chunk.at for chunk in found]
    assert times == sorted(times)
    assert times[-1] - asked >= 3 * 0.05
    assert 0.05 < sum(chunk.waited for chunk in found) <= times[-1] - asked
    # The usage and the end come in one piece.
    assert [chunk.waited for chunk in found if chunk.tokens] == [0.0]


def test_half_a_surrogate_pair_is_sent() -> None:
    with serving(fake_server.Answer(["a"])) as server:
        with Client(server.url).ask("first", [{"content": "\ud83d"}], {}) as chunks:
            list(chunks)
        assert server.requests[0]["messages"] == [{"content": "\ud83d"}]


def test_an_answer_comes_piece_by_piece_and_leaving_it_stops_the_server() -> None:
    with serving(fake_server.Answer(["one"], ends="silent")) as server:
        answer = Answer()
        with Client(server.url).ask("first", HELLO, {}) as chunks:
            for piece in answer.pieces(chunks):
                assert piece.text == "one"
                break  # The server would wait for the client to leave before it says more.
        assert server.client_left.wait(fake_server.WAIT)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (fake_server.Answer(["half"], ends="dead"), "broke off before the end"),
        (fake_server.Answer(["half"], ends="early"), "broke off before the end"),
        (fake_server.Answer(["half"], ends="error"), "gave the answer up: the engine gave up"),
        (
            fake_server.Answer(status=400, body={"error": {"message": "context is\n too long"}}),
            "answered with 400: context is too long",
        ),
        (
            fake_server.Answer(status=401, body={"error": "key secret is wrong"}),
            "answered with 401: key (the key) is wrong (--api-key gives the key)",
        ),
        (fake_server.Answer(status=404, body={"detail": "Not Found"}), "404: Not Found"),
        (fake_server.Answer(status=400, body={"message": "old vLLM"}), "400: old vLLM"),
        (fake_server.Answer(status=500, body=None), "answered with 500: Internal Server Error"),
    ],
)
def test_errors_are_one_line(answer: fake_server.Answer, message: str) -> None:
    with serving(answer) as server, pytest.raises(ChatError) as raised:
        ask(server, key="secret")
    said = str(raised.value)
    assert message in said
    assert server.url in said
    assert "secret" not in said
    assert "\n" not in said


def test_models() -> None:
    with serving() as server:
        assert Client(server.url).models()[0] == "first"
        assert Client(server.url.removesuffix("/v1")).models()[0] == "first"
        assert Client(f"{server.url}/").url == server.url
        with pytest.raises(ChatError, match=r"/v2/models answered with 404: Not Found"):
            Client(server.url.replace("v1", "v2")).models()[0]
        server.models = {"data": []}
        with pytest.raises(ChatError, match=r"names no model: give one by --model"):
            Client(server.url).models()[0]


def test_no_server_names_the_url_and_what_starts_one() -> None:
    with serving() as server:
        url = server.url
    with pytest.raises(ChatError, match=r"no server answers at .*lvllm serve") as raised:
        Client(url).models()[0]
    assert url in str(raised.value)


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://a/v1", "http://", "http://a:b/v1"])
def test_a_bad_url_is_refused(url: str) -> None:
    with pytest.raises(ChatError, match=r"--url .* is not allowed: http://HOST:PORT/v1"):
        Client(url)


@pytest.mark.parametrize("key", ["two words", "line\nfeed", "ключ"])
def test_a_bad_key_is_refused_and_not_printed(key: str) -> None:
    with pytest.raises(ChatError, match=r"--api-key is not allowed") as raised:
        Client("http://a/v1", key)
    assert key not in str(raised.value)


def test_the_environments_proxy_is_not_asked_for_this_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with serving() as server:
        assert Client(server.url).models()[0] == "first"
    monkeypatch.setenv("HTTP_PROXY", "nonsense://a")
    with pytest.raises(ChatError, match=r"the environment's proxy cannot be used"):
        Client("http://example.invalid/v1")
