"""`vllm serve` with experts beside an accelerator, by its stand-in on the host: the right tokens
from all of its processes, and an end to all of them.
"""

import random
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
import transformers

from lvllm import evaluation
from lvllm.serving.background import free_port
from lvllm.top.scrape import Scrape, scrape
from tests.e2e import reference
from tests.e2e.generate import TINY
from tests.e2e.hanging_copies import HangingCopies
from tests.e2e.server import Server
from tests.examples import test_grafana

TOKENS = 8
EXPERT_BYTES = 2 * 3 * 128 * 128
"""Of the demo model."""
# 9 to 17 tokens each: with chunks of up to 32, batches on both sides of the threshold.
TURNS = (1, 1, 1, 2, 2, 3, 4, 6)
MARGIN = 0.5
ARGUMENTS = (
    *("--config", "config.yaml", "--max-num-batched-tokens", "32", "--max-num-seqs", "8"),
    *("--kv-cache-memory-bytes", str(64 << 20)),
)
STREAMED = {
    "LVLLM_ACCELERATOR": "host",
    "LVLLM_GPU_PREFILL_MIN_BATCH_SIZE": "16",
    "LVLLM_GPU_PREFETCH_WINDOW": "1",
}
DRAFTS = (
    '{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1,'
    ' "prompt_lookup_max": 3}'
)


@dataclass
class Known:
    """Prompts for the demo model, and what transformers answers in float32."""

    prompts: list[list[int]]
    answers: list[list[int]]


@pytest.fixture(scope="module")
def known() -> Known:
    """Conversations as the model knows them: of other prompts its router has near ties."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    draw, questions = random.Random(seed), evaluation.load_questions()
    model, tokenizer = reference.load(TINY), transformers.AutoTokenizer.from_pretrained(TINY)
    known = Known([], [])
    for turns in TURNS:
        answer = None
        while answer is None:
            messages = list[dict[str, str]]()
            for question in draw.sample(questions, turns):
                messages += [*question.messages, {"role": "assistant", "content": question.answer}]
            ids = tokenizer.apply_chat_template(
                messages[:-1], add_generation_prompt=True, return_dict=True
            )
            prompt = list(ids["input_ids"])
            answer = _answer(model, prompt)
        known.prompts.append(prompt)
        known.answers.append(answer)
    return known


@torch.no_grad()
def _answer(model: Any, prompt: list[int]) -> list[int] | None:
    """None if a choice is a near tie, which rounding might turn."""
    tokens = list[int]()
    for _ in range(TOKENS):
        best = model(torch.tensor([prompt + tokens])).logits[0, -1].topk(2)
        if best.values[0] - best.values[1] < MARGIN:
            return None
        tokens.append(int(best.indices[0]))
    return tokens


def ask_in_vain(server: Server, prompt: list[int]) -> openai.APIError:
    """What the client is told."""
    with pytest.raises(openai.APIError) as caught:
        server.ask([prompt], TOKENS)
    return caught.value


def check_metrics(found: Scrape) -> None:
    """Of four layers, one of them resident, and batches on both sides of the threshold."""
    layers = found.by("class", name="lvllm_expert_layers")
    assert layers == {("offloaded",): 3, ("resident",): 1}
    calls = found.by("path", "reason", name="lvllm_expert_calls_total")
    assert calls.keys() == {
        *(("cpu", reason) for reason in ("small", "off", "graph", "shared")),
        *(("streamed", "large"), ("resident", "resident")),
    }
    assert calls["cpu", "off"] == calls["cpu", "graph"] == calls["cpu", "shared"] == 0
    # Each step is a batch of each layer, and all layers have its tokens.
    large, small, steps = (
        calls["streamed", "large"],
        calls["cpu", "small"],
        calls["resident", "resident"],
    )
    assert large > 0 < small
    assert large + small == 3 * steps
    tokens = found.by("path", name="lvllm_expert_tokens_total")
    assert tokens["cpu",] + tokens["streamed",] == 3 * tokens["resident",]
    assert tokens["streamed",] >= 16 * large
    # All groups but the last layer's are known to be complete. A layer has several where some of
    # its experts have no tokens.
    came = found.by("result", name="lvllm_staged_groups_total")
    assert sum(came.values()) >= large - 1
    assert came["hit",] + came["stall",] > 0
    layer = found.sum("lvllm_bank_bytes", **{"class": "offloaded"}) / 3
    assert 0 < found.sum("lvllm_copied_bytes_total", what="weights") <= layer * large
    assert found.sum("lvllm_copied_bytes_total", what="activations") == tokens["cpu",] * (
        4 * 128 + 8 * 4
    )
    for path, activity in (
        ("cpu", "computing"),
        ("streamed", "computing"),
        ("streamed", "copying"),
    ):
        spent = found.sum("lvllm_expert_seconds_total", path=path, activity=activity)
        assert spent > 0, (path, activity)
    assert found.sum("lvllm_staging_bytes", memory="ring") >= 2 * layer
    assert found.sum("lvllm_staging_bytes", memory="pinned") > 0
    assert found.sum("lvllm_streaming_threshold_tokens") == 16
    # The dashboard's numbers are there, but for those that other settings bring.
    assert {name for name in test_grafana.metric_names() if name not in found.samples} == {
        *("lvllm_prefill_queue", "lvllm_prefill_prompts_total", "lvllm_routed_tokens_total"),
        *("lvllm_cache_bytes", "lvllm_cache_reads_total"),
    }


def test_all_ways_at_once_and_an_end_in_the_middle(known: Known, tmp_path: Path) -> None:
    """Resident, streamed and hybrid layers, chunks of prompts, cached prefixes and drafts; then the
    server is told to end while weights are being copied.
    """
    hang = HangingCopies(tmp_path / "plugin")
    environment = STREAMED | {"LVLLM_GPU_RESIDENT_MOE_LAYERS": "0"} | hang.environment
    arguments = (*ARGUMENTS, "--block-size", "32", "--speculative-config", DRAFTS)
    with Server(tmp_path / "log", *arguments, **environment) as server:
        assert server.ready().ask(known.prompts, TOKENS) == known.answers
        assert server.ask(known.prompts, TOKENS) == known.answers
        for name in ("spec_decode_num_accepted_tokens", "prefix_cache_hits"):
            assert sum(server.metric(f"vllm:{name}_total").values()) > 0, name
        check_metrics(scrape(server.url))
        hang.begin()
        with ThreadPoolExecutor(1) as pool:
            vain = pool.submit(ask_in_vain, server, known.prompts[-1][::-1])
            hang.wait()
            segments = server.segments()
            server.process.send_signal(signal.SIGTERM)
            told = vain.result()
            assert isinstance(told, openai.APIStatusError), told
            assert told.status_code == 503
            assert "stopped before the answer was complete" in told.message
        server.ended()
        assert not [name for name in segments if name.exists()]


def test_replicas_and_the_watchdog(known: Known, tmp_path: Path) -> None:
    """Two replicas with caches answer; then a copy hangs in one, and all ends in one line."""
    hang = HangingCopies(tmp_path / "plugin")
    # Each rank has 8 of the 16 experts of each layer. Of these 32, one cache holds all and one 5.
    caches = {"LVLLM_GPU_EXPERT_CACHE": "1,0.0005"}
    environment = STREAMED | caches | {"LVLLM_WATCHDOG_SECONDS": "5"} | hang.environment
    arguments = (*ARGUMENTS, "--data-parallel-size", "2")
    with Server(tmp_path / "log", *arguments, **environment) as server:
        assert server.ready().ask(known.prompts, TOKENS) == known.answers
        assert server.ask(known.prompts, TOKENS) == known.answers
        answered = server.metric("vllm:generation_tokens_total")
        assert len(answered) == 2
        # Each of two API servers has the metrics of both replicas.
        for _ in range(6):
            tokens = scrape(server.url).by("engine", name="lvllm_expert_tokens_total")
            assert tokens.keys() == {("0",), ("1",)}
            assert min(tokens.values()) > 0
            slots = scrape(server.url).by("engine", name="lvllm_cache_bytes")
            assert slots == {("0",): 32 * EXPERT_BYTES, ("1",): 5 * EXPERT_BYTES}
        assert min(answered.values()) >= TOKENS, answered
        hang.begin()
        segments = server.segments()
        assert ask_in_vain(server, known.prompts[-1][::-1]).message
        server.ended()
        assert not [name for name in segments if name.exists()]
        said = server.log.read_text()
        # The bytes of the ring that the copy writes may have been read for another layer before.
        copy = r"copy to the GPU(, behind layer \d: experts on the GPU,)?"
        late = rf"{copy} has not happened for 5 s \(LVLLM_WATCHDOG_SECONDS\)"
        assert re.search(rf"^lvllm: layer \d: {late}: the process ends$", said, re.MULTILINE)


@contextmanager
def two_nodes(folder: Path) -> Iterator[tuple[Server, Server]]:
    """A pipeline's stages on two nodes, here of one host, once the first one answers."""
    arguments = (
        *(*ARGUMENTS, "--pipeline-parallel-size", "2", "--nnodes", "2"),
        *("--master-addr", "127.0.0.1", "--master-port", str(free_port())),
    )
    environment = STREAMED | {"VLLM_HOST_IP": "127.0.0.1", "LK_THREADS": "1"}
    # The second node's worker does not hear that it is to end, and is killed after so long.
    environment |= {"VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "1"}
    first, second = (*arguments, "--node-rank", "0"), (*arguments, "--node-rank", "1", "--headless")
    with (
        Server(folder / "second", *second, **environment) as other,
        Server(folder / "first", *first, **environment) as server,
    ):
        yield server.ready(), other


def test_two_nodes_end_when_they_are_told_to(known: Known, tmp_path: Path) -> None:
    with two_nodes(tmp_path) as (server, other):
        assert server.ask(known.prompts, TOKENS) == known.answers
        for node in (server, other):
            node.process.send_signal(signal.SIGTERM)
        for node in (server, other):
            node.ended()
            assert node.process.wait() == 0, node.said()


def test_a_node_ends_with_the_first(tmp_path: Path) -> None:
    with two_nodes(tmp_path) as (server, other):
        server.process.send_signal(signal.SIGTERM)
        for node in (server, other):
            node.ended()
        assert (server.process.wait(), other.process.wait()) == (0, 1)
        line = r"^lvllm: the first node \(127\.0\.0\.1:\d+\) is gone \(.+\), so this one ends$"
        assert len(re.findall(line, other.log.read_text(), re.MULTILINE)) == 1
