"""Questions are loaded, scored and asked, the latter from a small HTTP server of our own."""

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvllm.evaluation import EvaluationError, Question, ask_server, load_questions, passages, score
from lvllm.evaluation.likelihood import Likelihoods
from lvllm.evaluation.models import ServedModel, ServerTokenizer
from lvllm.evaluation.processes import Work


def _question(task: str, answer: str) -> Question:
    return Question(task=task, operands=(1, "a"), question=f"say {answer}", answer=answer)


def test_the_default_questions_are_500_in_5_balanced_tasks() -> None:
    tallies = score(questions := load_questions(), [q.answer for q in questions]).by_task
    assert {task: tally.asked for task, tally in tallies.items()} == dict.fromkeys(
        ("add", "subtract", "compare", "sort", "reverse"), 100
    )
    assert all(tally.accuracy == 1.0 for tally in tallies.values())


def test_score_counts_by_task_and_keeps_what_was_wrong() -> None:
    questions = [_question("add", "1 + 1 = 2."), _question("add", "2"), _question("sort", "1, 2")]
    result = score(questions, ["1 + 1 = 2.", "3", "1, 2"])
    assert result.by_task["add"].right == 1
    assert result.by_task["add"].accuracy == 0.5
    assert result.by_task["sort"].accuracy == 1.0
    assert result.total.right == 2
    assert result.accuracy == pytest.approx(2 / 3)
    assert result.wrong == ((questions[1], "3"),)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("1 + 1 = 2.", True),
        ("  1 +  1\n= 2.\n", True),
        ("1+1 = 2.", False),
        ("1 + 1 = 2", False),
        ("1 + 1 = 2. So 2.", False),
        ("", False),
    ],
)
def test_only_white_space_is_forgiven(answer: str, right: bool) -> None:
    assert score([_question("add", "1 + 1 = 2.")], [answer]).accuracy == right


@given(st.text(), st.text())
def test_a_different_text_is_never_right(expected: str, answer: str) -> None:
    same = "".join(expected.split()) == "".join(answer.split())
    assert same or score([_question("add", expected)], [answer]).accuracy == 0


def test_score_refuses_a_wrong_number_of_answers() -> None:
    with pytest.raises(ValueError, match="1 answers to 2 questions"):
        score([_question("add", "1")] * 2, ["1"])
    with pytest.raises(ValueError, match="no questions"):
        score([], [])


def test_a_broken_question_file_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    good = _question("add", "1").model_dump_json()
    path.write_text(f'{good}\n{{"task": "add"}}\n')
    with pytest.raises(ValueError, match=r"questions.jsonl, line 2: operands"):
        load_questions(path)
    path.write_text("")
    with pytest.raises(ValueError, match="holds no questions"):
        load_questions(path)


class _Parrot(BaseHTTPRequestHandler):
    """Serves a model that answers `say X` with X, and refuses `say no`. Its tokens are bytes, after
    one of 1; of each it thinks as `_row` says, and it refuses to read a text with a `!`.
    """

    key = ""
    """The key that it asks for, if it asks for one."""

    @staticmethod
    def _row(token: int, top: int) -> dict[str, dict[str, float]]:
        """vLLM's `prompt_logprobs` in one place. The token is first, and its value is its rank."""
        ranks = [token, *(other for other in range(top) if other != token)]
        if token >= top:
            ranks.append(top - 1)
        value = {rank: {"logprob": -0.25 * (rank + 1), "rank": rank + 1} for rank in ranks}
        return {str(rank): value[rank] for rank in ranks}

    def _read(self, request: dict[str, Any]) -> None:
        ids, top = request["prompt"], request["prompt_logprobs"]
        if ord("!") in ids:
            self._reply(400, {"error": {"message": "too loud"}})
            return
        rows = [None, *(self._row(token, top) for token in ids[1:])]
        choice = {"index": 0, "text": "", "finish_reason": "length", "prompt_logprobs": rows}
        if ord("?") in ids:
            del choice["prompt_logprobs"]
        self._reply(
            200,
            {"id": "1", "object": "text_completion", "created": 0, "model": "parrot"}
            | {"choices": [choice]},
        )

    def _reply(self, status: int, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _is_refused(self) -> bool:
        refused = bool(self.key) and self.headers["Authorization"] != f"Bearer {self.key}"
        if refused:
            self._reply(401, {"error": {"message": "Unauthorized"}})
        return refused

    def do_GET(self) -> None:
        if self._is_refused():
            return
        self._reply(200, {"object": "list", "data": [{"id": "parrot", "object": "model"}]})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._is_refused():
            return
        assert request["model"] == "parrot"
        if self.path == "/tokenize":
            ids = [1] * request["add_special_tokens"] + list(request["prompt"].encode())
            self._reply(200, {"tokens": ids, "count": len(ids), "max_model_len": 99})
            return
        if self.path == "/v1/completions":
            self._read(request)
            return
        assert request["temperature"] == 0
        text = request["messages"][-1]["content"].removeprefix("say ")
        if text == "no":
            self._reply(400, {"error": {"message": "no such thing"}})
            return
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        self._reply(
            200,
            {"id": "1", "object": "chat.completion", "created": 0, "model": "parrot"}
            | {"choices": [choice]},
        )

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A proxy is named that does not answer; it is none of this server's business."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with ThreadingHTTPServer(("127.0.0.1", 0), _Parrot) as http:
        Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}/v1"
        http.shutdown()


def test_a_server_is_asked_and_answers_come_back_in_order(server: str) -> None:
    questions = [_question("add", str(n)) for n in range(50)]
    assert ask_server(questions, server) == [str(n) for n in range(50)]


def test_what_goes_wrong_with_a_server_is_one_line(server: str) -> None:
    with pytest.raises(EvaluationError, match=r"refused a question: .*no such thing"):
        ask_server([_question("add", "no")], server)
    with pytest.raises(EvaluationError, match=r"^no server answers at http://127.0.0.1:9/v1$"):
        ask_server([_question("add", "1")], "http://127.0.0.1:9/v1", model="parrot")


def test_a_server_that_asks_for_a_key(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Parrot, "key", "sesame")
    read = _read(server, tmp_path / "text", "some text", top=5, api_key="sesame")
    assert len(read.logprobs) == len("some text")
    served = ServedModel(server, api_key="sesame")
    assert served.measure(Work([_question("add", "7")])).outcome.answers == ["7"]
    with pytest.raises(EvaluationError, match=r"/v1 names no model: .*Unauthorized"):
        ServedModel(server)
    with pytest.raises(EvaluationError, match=r"/tokenize makes no tokens: .*401"):
        ServerTokenizer(server, "parrot", "other").encode("a", special=False)
    assert "sesame" not in repr(ServerTokenizer(server, "parrot", "sesame"))


@pytest.mark.parametrize("url", ["http://[::1", "http://host:port/v1"])
def test_what_is_no_url_is_one_line(url: str) -> None:
    with pytest.raises(EvaluationError, match=r"^\S.* is no URL: .*$"):
        ServedModel(url, "parrot")


def _read(server: str, path: Path, text: str, top: int, api_key: str = "") -> Likelihoods:
    path.write_text(text)
    served = ServedModel(server, api_key=api_key)
    work = Work(passages=passages.of_text(path, served.tokenizer(), 8, 4), top=top)
    likelihoods = served.measure(work).outcome.likelihoods
    assert likelihoods is not None
    return likelihoods


def test_a_server_reads_a_text(server: str, tmp_path: Path) -> None:
    text = "a text, \0 and\1 more\2"
    found = _read(server, tmp_path / "text", text, top=5)
    # All bytes are scored, since a BOS token is before them. The rank of a byte is its value.
    assert found.logprobs == pytest.approx([-0.25 * (byte + 1) for byte in text.encode()])
    assert np.array_equal(found.top_ids, [[0, 1, 2, 3, 4]] * len(text))
    assert found.top_logprobs == pytest.approx(-0.25 * (found.top_ids + 1.0))
    assert found.vocabulary is None


def test_what_goes_wrong_while_a_server_reads_is_one_line(server: str, tmp_path: Path) -> None:
    path = tmp_path / "text"
    with pytest.raises(EvaluationError, match=r"refused a passage: .*too loud"):
        _read(server, path, "silent, loud!", top=5)
    with pytest.raises(EvaluationError, match="gives no prompt_logprobs: it is no vLLM server"):
        _read(server, path, "silent, what?", top=5)
    with pytest.raises(EvaluationError, match=r"^no server answers at http://127.0.0.1:9/v1$"):
        ServedModel("http://127.0.0.1:9/v1")
    with pytest.raises(EvaluationError, match=r"^no server answers at .*:9/tokenize$"):
        ServerTokenizer("http://127.0.0.1:9/v1", "x").encode("a", special=False)
