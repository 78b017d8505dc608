"""The repository's own config.yaml, served and asked as a user would."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from examples.demo import server
from lvllm import evaluation
from lvllm.evaluation import passages
from lvllm.evaluation.likelihood import compare
from lvllm.evaluation.logprobs import logprobs_from_transformers
from lvllm.evaluation.models import ServedModel
from lvllm.evaluation.passages import LocalTokenizer
from lvllm.evaluation.processes import Work
from tests.e2e.generate import TINY
from tests.e2e.server import fail_to_serve


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The demo model, served through LvLLM: (base URL, log)."""
    log = tmp_path_factory.mktemp("serve") / "log"
    with server(log, "--config", "config.yaml") as url:
        yield url, log


def test_lvllm_computes_the_experts(demo: tuple[str, Path]) -> None:
    assert demo[1].read_text().count("LvLLM: experts on lk") == 1


def test_chat_streams_what_it_answers_whole(demo: tuple[str, Path]) -> None:
    client = openai.OpenAI(base_url=f"{demo[0]}/v1", api_key="none")
    question = evaluation.load_questions()[0]
    asked: Any = {"model": "tiny-moe", "messages": question.messages, "temperature": 0}
    whole: Any = client.chat.completions.create(**asked)
    stream: Any = client.chat.completions.create(**asked, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert whole.choices[0].message.content == question.answer
    assert "".join(pieces) == question.answer
    assert len(pieces) > 2


def test_held_out_score(demo: tuple[str, Path]) -> None:
    asked = evaluation.load_questions()
    result = evaluation.score(asked, evaluation.ask_server(asked, f"{demo[0]}/v1"))
    assert result.total.asked == 500
    assert result.accuracy >= 0.97, result.by_task


def test_a_text_is_read_through_the_server(demo: tuple[str, Path]) -> None:
    """As transformers reads it, in float32; seen are 1e-6 and 5e-8 nats apart."""
    served = ServedModel(f"{demo[0]}/v1")
    read = passages.of_chats(evaluation.load_questions()[:20], served.tokenizer())
    assert read.same_ids(
        passages.of_chats(evaluation.load_questions()[:20], LocalTokenizer(str(TINY)))
    )
    found = served.measure(Work(passages=read, top=20)).outcome.likelihoods
    assert found is not None
    expected = logprobs_from_transformers(read, TINY, 20, dtype="float32")
    comparison = compare(expected, found)
    print(f"{found.nll=} {expected.nll=} {comparison}")
    assert abs(found.nll - expected.nll) <= 1e-3
    assert comparison.divergence <= 3e-4
    assert comparison.covered >= 0.99
    assert comparison.agreement >= 0.98


@pytest.mark.parametrize(
    ("variable", "value", "message", "command"),
    [
        ("LVLLM_GPU_RESIDENT_MOE_LAYERS", "9-3", "layer indices and ascending ranges", True),
        (
            "LVLLM_GPU_RESIDENT_MOE_LAYERS",
            "99",
            "layer 99 of examples/models/tiny-moe has no",
            False,
        ),
        ("LVLLM_GPU_PREFILL_MIN_BATCH_SIZE", "1000000", "allowed is 0 to 2048", False),
    ],
)
def test_refused_settings_end_the_server_with_one_line(
    variable: str, value: str, message: str, command: bool
) -> None:
    code, errors = fail_to_serve("--config", "config.yaml", command=command, **{variable: value})
    last = errors.strip().splitlines()[-1]
    assert code == 1
    assert last.startswith(f"lvllm: {variable}={value!r}")
    assert message in last
    assert "Traceback" not in errors
    assert "Loading safetensors" not in errors
