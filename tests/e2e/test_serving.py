"""The repository's own config.yaml, served and asked as a user would."""

import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import openai
import pytest

from examples.demo import server
from lvllm import evaluation
from lvllm.bench.load import Endpoint
from lvllm.evaluation import passages
from lvllm.evaluation.likelihood import compare
from lvllm.evaluation.logprobs import logprobs_from_transformers
from lvllm.evaluation.models import ServedModel
from lvllm.evaluation.passages import LocalTokenizer
from lvllm.evaluation.processes import Work
from lvllm.top.scrape import Scrape, scrape
from lvllm.tuning.quality import Quality
from tests.e2e.generate import TINY
from tests.e2e.server import fail_to_serve


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The demo model, served through LvLLM: (base URL, log)."""
    log = tmp_path_factory.mktemp("serve") / "log"
    with server(log, "--config", "config.yaml", LVLLM_METRICS_EXPERTS="1") as url:
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


def test_the_cost_of_settings_that_change_nothing(demo: tuple[str, Path]) -> None:
    """`lvllm tune` samples the model's own answers, and asks two servers for their tokens."""
    to = Endpoint(demo[0], "tiny-moe")
    quality = Quality()
    for plan in (False, True, False):  # The plan's server has to be the first one.
        early = quality.cost
        quality.ask(to, plan=plan)
    cost = quality.cost
    assert early is None
    assert cost is not None
    assert len(cost.divergences) == 8 * 128
    assert cost.divergence <= 1e-3
    assert cost.agreement >= 0.99


LAYERS, TOPK, EXPERT_BYTES = 4, 4, 3 * 128 * 128 * 2
"""Of the demo model; its experts are in bf16."""


def grown(before: Scrape, after: Scrape, name: str, **labels: str) -> float:
    return after.sum(name, **labels) - before.sum(name, **labels)


def complete(url: str, prompt: list[int], tokens: int) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    asked: Any = {"model": "tiny-moe", "prompt": prompt, "max_tokens": tokens}
    assert client.completions.create(**asked, extra_body={"ignore_eos": True})


def random_prompt() -> list[int]:
    """So short that the prefix cache keeps nothing of it."""
    return random.choices(range(3, 60), k=random.randint(2, 15))


def test_metrics_count_what_requests_did(demo: tuple[str, Path]) -> None:
    """One request after the other, so the number of steps is known."""
    url, prompts, tokens = demo[0], [random_prompt() for _ in range(3)], 9
    before, start = scrape(url), time.monotonic()
    for prompt in prompts:
        complete(url, prompt, tokens)
    elapsed, after = time.monotonic() - start, scrape(url)
    assert after.sum("lvllm_expert_layers") == LAYERS
    assert after.sum("lvllm_bank_bytes") == LAYERS * 16 * EXPERT_BYTES
    steps = len(prompts) * tokens
    computed = sum(len(prompt) for prompt in prompts) + len(prompts) * (tokens - 1)
    calls = grown(before, after, "lvllm_expert_calls_total", path="cpu", reason="no_gpu")
    assert calls == steps * LAYERS
    assert grown(before, after, "lvllm_expert_tokens_total") == computed * LAYERS
    computing = grown(before, after, "lvllm_expert_seconds_total", activity="computing")
    engines = grown(before, after, "vllm:request_inference_time_seconds_sum")
    assert 0 < computing < engines < elapsed
    assert grown(before, after, "lvllm_expert_seconds_total", activity="waiting") == 0
    assert grown(before, after, "lvllm_batch_experts_count") == calls
    experts = grown(before, after, "lvllm_batch_experts_sum")
    assert TOPK * calls <= experts <= TOPK * computed * LAYERS
    read = grown(before, after, "lvllm_expert_read_bytes_total")
    assert read == pytest.approx(experts * EXPERT_BYTES)
    for layer in range(LAYERS):
        routed = grown(before, after, "lvllm_routed_tokens_total", layer=str(layer))
        assert routed == computed * TOPK
    assert after.sum("lvllm_nan_stops_total") == 0


def test_metrics_under_load(demo: tuple[str, Path]) -> None:
    """No count goes back while requests run, and none is lost in the end."""
    url, prompts, tokens = demo[0], [random_prompt() for _ in range(12)], 40
    scrapes = [scrape(url)]
    with ThreadPoolExecutor(len(prompts)) as pool:
        running = [pool.submit(complete, url, prompt, tokens) for prompt in prompts]
        while not all(one.done() for one in running):
            scrapes.append(scrape(url))
            time.sleep(0.05)
        for one in running:
            one.result()
    scrapes.append(scrape(url))
    for earlier, later in pairwise(scrapes):
        for name in ("calls", "tokens", "seconds", "read_bytes"):
            assert grown(earlier, later, f"lvllm_expert_{name}_total") >= 0
    assert any(
        0
        < grown(scrapes[0], one, "lvllm_expert_tokens_total")
        < grown(scrapes[0], scrapes[-1], "lvllm_expert_tokens_total")
        for one in scrapes
    )
    computed = sum(len(prompt) + tokens - 1 for prompt in prompts)
    assert grown(scrapes[0], scrapes[-1], "lvllm_expert_tokens_total") == computed * LAYERS
    assert grown(scrapes[0], scrapes[-1], "lvllm_routed_tokens_total") == computed * LAYERS * TOPK


@pytest.mark.parametrize(
    ("variable", "value", "message", "command"),
    [
        (
            "LVLLM_GPU_RESIDENT_MOE_LAYERS",
            "9-3",
            "layer indices from 0 to 9999 and ascending ranges",
            True,
        ),
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
