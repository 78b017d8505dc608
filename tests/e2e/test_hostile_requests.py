"""A server gives right answers before, between and after requests that are to break it."""

import asyncio
import json
import os
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from lvllm.top.scrape import scrape
from tests.e2e import hostile
from tests.e2e.generate import TINY
from tests.e2e.server import END_SECONDS, Server

LONGEST, LAYERS, TOPK = 512, 4, 4
VOCABULARY: int = json.loads((TINY / "config.json").read_text())["vocab_size"]
MODEL = "tiny-moe"
ARGUMENTS = (
    str(TINY), "--served-model-name", MODEL, "--max-model-len", str(LONGEST), "--enforce-eager",
    "--max-num-seqs", "32", "--no-enable-prefix-caching",
)  # fmt: skip
"""Nothing of a prompt is kept for later ones, so the tokens that the server computes are known."""
SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "LVLLM_METRICS_EXPERTS": "1"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("hostile") / "log"
    with Server(log, *ARGUMENTS, **SETTINGS) as started:
        yield started.ready()
        assert "Traceback" not in log.read_text(errors="replace"), started.said()


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=END_SECONDS) as found:
        yield found


@pytest.fixture(scope="module")
def questions(client: httpx.Client) -> list[hostile.Question]:
    return hostile.questions(client, MODEL, VOCABULARY, 8, 24)


def check(client: httpx.Client, questions: Sequence[hostile.Question]) -> None:
    for one in questions:
        assert hostile.answer(client, MODEL, one.prompt, len(one.answer)) == one.answer


@pytest.fixture(autouse=True)
def unharmed(
    server: Server, client: httpx.Client, questions: list[hostile.Question]
) -> Iterator[None]:
    """After each test: the same processes run, none has work, and the answers are as before."""
    processes = server.processes()
    yield
    hostile.settle(server)
    before = scrape(server.url)
    check(client, questions[:3])
    after = scrape(server.url)
    computed = sum(len(one.prompt) + len(one.answer) - 1 for one in questions[:3])
    tokens, routed = "lvllm_expert_tokens_total", "lvllm_routed_tokens_total"
    assert after.sum(tokens) - before.sum(tokens) == LAYERS * computed
    assert after.sum(routed) == TOPK * after.sum(tokens)
    assert after.sum("lvllm_nan_stops_total") == 0
    assert server.processes() == processes


def test_wrong_requests_are_refused_and_odd_ones_answered(
    client: httpx.Client, questions: list[hostile.Question]
) -> None:
    bodies = {
        name: (400, body) for name, body in hostile.refused(MODEL, VOCABULARY, LONGEST).items()
    }
    bodies |= {
        name: (200, body) for name, body in hostile.accepted(MODEL, VOCABULARY, LONGEST).items()
    }
    bodies["an unknown model"] = (404, bodies["an unknown model"][1])
    names = list(bodies)
    random.shuffle(names)
    print(names)
    for n, name in enumerate(names):
        status, body = bodies[name]
        answer = client.post(
            "/v1/completions", content=body, headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == status, (name, answer.text)
        if status == 200:
            assert all(one["finish_reason"] for one in answer.json()["choices"]), name
        if n % 8 == 0:
            check(client, [random.choice(questions)])


def test_clients_that_leave(server: Server, questions: list[hostile.Question]) -> None:
    """200 at once, half of whom leave at some moment, beside others that send no whole request."""
    silent = hostile.disturb(server, MODEL)
    asked = random.choices(questions, k=200)
    stayed = asyncio.run(hostile.crowd(server, MODEL, asked, 200))
    for client in silent:
        client.close()
    assert 50 < stayed < 200


def test_cpus_that_change(server: Server, questions: list[hostile.Question]) -> None:
    """All threads of all processes are moved to other CPUs, again and again, while they work."""
    cpus = sorted(os.sched_getaffinity(0))
    before = {thread: os.sched_getaffinity(thread) for thread in threads(server)}
    with ThreadPoolExecutor(1) as pool:
        crowd = hostile.crowd(server, MODEL, random.choices(questions, k=40), 40)
        answers = pool.submit(asyncio.run, crowd)
        moves = 0
        while moves < 3 or not answers.done():
            allowed = random.sample(cpus, random.randint(1, len(cpus)))
            for thread in threads(server):
                with suppress(ProcessLookupError):
                    os.sched_setaffinity(thread, allowed)
            moves += 1
            time.sleep(0.2)
        answers.result()
    for thread, own in before.items():
        with suppress(ProcessLookupError):
            os.sched_setaffinity(thread, own)


def threads(server: Server) -> list[int]:
    """The ids of all threads of its processes."""
    found = []
    for process in server.processes():
        with suppress(FileNotFoundError):
            found += [int(task.name) for task in Path(f"/proc/{process}/task").iterdir()]
    return found
