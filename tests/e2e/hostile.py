"""Requests and clients that a server has to survive."""

import asyncio
import json
import random
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from lvllm.top.scrape import scrape
from tests.e2e.server import END_SECONDS, Server

__all__ = ["Question", "accepted", "answer", "crowd", "disturb", "questions", "refused", "settle"]

NAN, INFINITE = float("nan"), float("inf")


def refused(model: str, vocabulary: int, longest: int) -> dict[str, bytes]:
    """Bodies of completion requests that are the client's mistakes.

    Args:
        model: the name under which the model is served.
        vocabulary: the number of its tokens.
        longest: max-model-len.
    """
    fields: dict[str, dict[str, Any]] = {
        "a wrong type": {"max_tokens": "many"},
        "a fraction": {"max_tokens": 1.5},
        "no token": {"max_tokens": 0},
        "fewer tokens than none": {"max_tokens": -1},
        "too many tokens": {"max_tokens": 10**30},
        "a negative temperature": {"temperature": -1},
        "a temperature of NaN": {"temperature": NAN},
        "an infinite temperature": {"temperature": INFINITE},
        "a top_p of NaN": {"top_p": NAN},
        "a top_k below 0": {"top_k": -5},
        "a min_p of NaN": {"min_p": NAN},
        "a penalty of NaN": {"presence_penalty": NAN},
        "an infinite penalty": {"repetition_penalty": INFINITE},
        "a seed of 100 bits": {"seed": 1 << 100},
        "too many answers": {"n": 10**6},
        "an unknown model": {"model": "nobody/nothing"},
        "too many logprobs": {"logprobs": 1000},
        "negative logprobs": {"prompt_logprobs": -7},
        "no prompt": {"prompt": ""},
        "half a character": {"prompt": "\ud800"},
        "no ids": {"prompt": []},
        "a prompt without ids": {"prompt": [[]]},
        "text among ids": {"prompt": ["a", 1]},
        "the first id outside the vocabulary": {"prompt": [vocabulary]},
        "an id of 64 bits": {"prompt": [5, 1 << 63]},
        "a negative id": {"prompt": [5, -1, 6]},
        "a prompt as long as the model's context": {"prompt": [5] * longest},
        "a huge text": {"prompt": "word " * 400_000},
        "thousands of stop strings": {"stop": [f"stop{n}" for n in range(5000)]},
        "an empty stop string": {"stop": [""]},
        "stop ids outside the vocabulary": {"stop_token_ids": [-1, 1 << 62], "min_tokens": 1},
        "a bias outside the vocabulary": {"logit_bias": {str(vocabulary): 1}},
        "thousands of bad words": {"bad_words": [f"{n}" for n in range(2000)]},
        "no id allowed": {"allowed_token_ids": []},
        "an expression that is not one": {"structured_outputs": {"regex": "(((("}},
    }
    bodies = {name: body(model, **changes) for name, changes in fields.items()}
    whole = body(model)
    return bodies | {
        "no body": b"",
        "no object": b"[]",
        "half an object": whole[: len(whole) // 2],
        "more than an object": whole + b"}",
        "an object in an object, and so on": b'{"prompt":' * 20_000,
        "bytes that are not UTF-8": whole.replace(b"null", b'"\xc3\x28\xff"'),
    }


def accepted(model: str, vocabulary: int, longest: int) -> dict[str, bytes]:
    """Bodies of completion requests that are odd and right."""
    fields: dict[str, dict[str, Any]] = {
        "an unknown field": {"no_such_field": {"a": [1]}},
        "a zero character": {"prompt": "a\0b"},
        "a temperature next to 0": {"temperature": 1e-300},
        "a penalty next to 0": {"repetition_penalty": 1e-320},
        "a huge top_k": {"temperature": 1, "top_k": 10**12},
        "the least seed": {"temperature": 1, "seed": -(1 << 63)},
        "an infinite bias": {"logit_bias": {"5": INFINITE}},
        "no token likely": {"logit_bias": {str(id): -100 for id in range(vocabulary)}},
        "the longest prompt": {"prompt": [vocabulary - 1] * (longest - 1), "max_tokens": 1},
        "many prompts": {"prompt": [[5]] * 50, "max_tokens": 1},
        "a long name": {"request_id": "x" * 50_000},
    }
    return {name: body(model, **changes) for name, changes in fields.items()}


def body(served: str, **changes: Any) -> bytes:
    """A good request with some fields changed; `user` is null, to be replaced in the text."""
    good = {"model": served, "prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0, "user": None}
    return json.dumps(good | changes).encode()


@dataclass(frozen=True)
class Question:
    """A prompt, and the answer to it while nothing else runs."""

    prompt: list[int]
    answer: list[int]


def answer(client: httpx.Client, model: str, prompt: Sequence[int], tokens: int) -> list[int]:
    """The ids of a greedy answer of so many tokens."""
    asked = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    asked |= {"ignore_eos": True, "return_token_ids": True}
    found = client.post("/v1/completions", json=asked).raise_for_status().json()
    return list(found["choices"][0]["token_ids"])


def questions(
    client: httpx.Client, model: str, vocabulary: int, count: int, most: int
) -> list[Question]:
    """Random questions whose answers have up to `most` tokens, asked for one after the other."""
    found = []
    for _ in range(count):
        prompt = random.choices(range(vocabulary), k=random.randint(1, 60))
        found.append(Question(prompt, answer(client, model, prompt, random.randint(1, most))))
    return found


async def crowd(server: Server, model: str, asked: Sequence[Question], at_once: int) -> int:
    """Ask all, `at_once` at a time; about half of the clients leave at a random moment.

    Returns how many have stayed to the end. AssertionError if a client has got a wrong token, or
    was refused.
    """
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    gate = asyncio.Semaphore(at_once)
    async with httpx.AsyncClient(base_url=server.url, timeout=5 * END_SECONDS, limits=limits) as c:

        async def one(question: Question) -> bool:
            async with gate:
                stays = random.random() < 0.5
                if not stays and random.random() < 0.3:  # It may leave before the answer begins.
                    try:
                        async with asyncio.timeout(random.uniform(0, 0.5)):
                            return await one_stream(c, model, question, None)
                    except TimeoutError:
                        return False
                patience = None if stays else random.randint(0, len(question.answer))
                return await one_stream(c, model, question, patience)

        return sum(await asyncio.gather(*(one(question) for question in asked)))


async def one_stream(
    client: httpx.AsyncClient, model: str, question: Question, patience: int | None
) -> bool:
    """Read an answer as it comes, and leave after `patience` tokens; whether it was read whole."""
    asked = {
        "model": model, "prompt": question.prompt, "max_tokens": len(question.answer),
        "temperature": 0, "ignore_eos": True, "return_token_ids": True, "stream": True,
    }  # fmt: skip
    tokens: list[int] = []
    async with client.stream("POST", "/v1/completions", json=asked) as stream:
        assert stream.status_code == 200, await stream.aread()
        async for line in stream.aiter_lines():
            if patience is not None and len(tokens) >= patience:
                break
            if line.startswith("data: {"):
                tokens += json.loads(line[len("data: ") :])["choices"][0]["token_ids"]
                assert tokens == question.answer[: len(tokens)], question
    return tokens == question.answer


def disturb(server: Server, model: str) -> list[socket.socket]:
    """Clients that send no whole request, or leave the answer unread.

    Returns those that stay and say nothing more.
    """
    whole = body(model, max_tokens=300, stream=True, ignore_eos=True)
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n"
    )
    good, never = head % len(whole) + whole, head % (len(whole) + 1000) + whole
    for sent in (
        b"\x16\x03\x01\x02\x00\x01\x00\x01",  # what a client of HTTPS says first
        b"GET /" + b"a" * 200_000,
        head[:50],
        head % -1,
        never,
        good,  # no byte of the answer is read
    ):
        for polite in (True, False):
            with connect(server) as client:
                client.sendall(sent)
                if not polite:  # The kernel then sends a reset.
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    for _ in range(4):
        with connect(server) as client:  # reads the beginning, and resets the connection
            client.sendall(good)
            assert client.recv(100).startswith(b"HTTP/1.1 200 OK")
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    silent = []
    for sent in (b"", head[:30], never) * 4:
        silent.append(connect(server))
        silent[-1].sendall(sent)
    return silent


def connect(server: Server) -> socket.socket:
    at = urlsplit(server.url)
    return socket.create_connection((at.hostname, at.port), END_SECONDS)


def settle(server: Server) -> None:
    """Wait until no request runs or waits."""
    until = time.monotonic() + END_SECONDS
    while True:
        found = scrape(server.url)
        left = {name: found.sum(f"vllm:num_requests_{name}") for name in ("running", "waiting")}
        if not any(left.values()):
            return
        assert time.monotonic() < until, left
        time.sleep(0.1)
