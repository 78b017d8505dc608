"""What a server with an API key shows to others: on the network, without the key, in its log."""

import ipaddress
import os
import random
import re
import signal
import string
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from lvllm.patches.privacy import OPEN
from tests.e2e.server import END_SECONDS, Server

LONGEST = 512
"""max-model-len in config.yaml."""
ARGUMENTS = (
    "--tensor-parallel-size", "2", "--enable-auto-tool-choice", "--tool-call-parser", "hermes",
)  # fmt: skip


def unique() -> str:
    return "".join(random.choices(string.ascii_lowercase, k=12))


SECRET, KEY, CONFIGURED_KEY, VARIABLE_KEY, WRONG_KEY = (unique() for _ in range(5))
KEYS = (KEY, CONFIGURED_KEY, VARIABLE_KEY, WRONG_KEY)
"""The option's key counts, then the configuration's, then the variable's."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("security")
    config = folder / "config.yaml"
    config.write_text(f"{Path('config.yaml').read_text()}\napi-key: {CONFIGURED_KEY}\n")
    keys = ("--config", str(config), "--api-key", KEY)
    settings = {"VLLM_LOGGING_LEVEL": "DEBUG", "VLLM_API_KEY": VARIABLE_KEY}
    with Server(folder / "log", *ARGUMENTS, *keys, **settings) as started:
        yield started.ready()


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    """A client with the key."""
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=END_SECONDS) as found:
        yield found


def listening(server: Server) -> dict[int, list[tuple[str, int]]]:
    """The addresses and ports on which its processes listen, by process."""
    found = {}
    for process in server.processes():
        with suppress(psutil.NoSuchProcess):
            connections = psutil.Process(process).net_connections("inet")
            found[process] = [one.laddr for one in connections if one.status == psutil.CONN_LISTEN]
    return found


def workers(server: Server) -> list[int]:
    """The ranks' processes: each listens for the other one."""
    port = httpx.URL(server.url).port
    return [
        process
        for process, addresses in listening(server).items()
        if any(own != port for _, own in addresses)
    ]


def test_nothing_listens_but_on_loopback(server: Server) -> None:
    found = [address for addresses in listening(server).values() for address in addresses]
    assert [ip for ip, _ in found if not ipaddress.ip_address(ip).is_loopback] == []
    assert ("127.0.0.1", httpx.URL(server.url).port) in found
    assert len(workers(server)) == 2


def test_sockets_are_in_a_folder_of_the_user(server: Server) -> None:
    paths = set()
    for process in server.processes():
        with suppress(psutil.NoSuchProcess):
            connections = psutil.Process(process).net_connections("unix")
            paths |= {str(one.laddr) for one in connections if str(one.laddr).startswith("/")}
    assert paths
    for path in paths:
        assert Path(path).parent.stat().st_mode & 0o077 == 0, path
    for segment in server.segments():
        assert segment.stat().st_mode & 0o077 == 0, segment


def test_the_key_is_asked_for_wherever_the_model_is_used(
    server: Server, client: httpx.Client
) -> None:
    paths: dict[str, Any] = client.get("/openapi.json").json()["paths"]
    assert {"/v1/completions", "/invocations", "/tokenize", "/health"} <= paths.keys()
    for path, methods in (paths | {"/metrics": {"get": {}}, "/docs": {"get": {}}}).items():
        for method in methods:
            url = server.url + path.replace("{", "").replace("}", "")
            for headers in ({}, {"Authorization": f"Bearer {WRONG_KEY}"}):
                answer = httpx.request(method, url, headers=headers, timeout=END_SECONDS)
                assert (answer.status_code == 401) == (path not in OPEN), (method, path)


def ask(client: httpx.Client, path: str, status: int, **body: Any) -> None:
    answer = client.post(path, json={"model": "tiny-moe"} | body)
    assert answer.status_code == status, answer.text


TOOL = {
    "type": "function",
    "function": {
        "name": f"find_{SECRET}",
        "description": SECRET,
        "parameters": {"type": "object", "properties": {SECRET: {"enum": [SECRET]}}},
    },
}


def send_everything(client: httpx.Client) -> None:
    """The secret word in requests of many kinds, right and wrong ones."""
    text = f"Spell {SECRET} backwards"
    chat, completion = "/v1/chat/completions", "/v1/completions"
    messages = [{"role": "user", "content": text}]
    for stream in (False, True):
        ask(client, chat, 200, messages=messages, stream=stream, max_tokens=8, stop=[SECRET])
        ask(client, completion, 200, prompt=text, stream=stream, max_tokens=8)
        ask(client, chat, 200, messages=messages, tools=[TOOL], stream=stream, max_tokens=8)
    forced = {"type": "function", "function": {"name": f"find_{SECRET}"}}
    ask(client, chat, 200, messages=messages, tools=[TOOL], tool_choice=forced, max_tokens=24)
    schema = {"enum": [SECRET]}
    ask(client, completion, 200, prompt=text, structured_outputs={"json": schema}, max_tokens=24)
    ask(client, "/tokenize", 200, prompt=text)
    # Wrong ones.
    ask(client, completion, 400, prompt=f"{SECRET} " * LONGEST)
    ask(client, chat, 400, messages=[{"role": SECRET, "content": [{"type": SECRET}]}])
    ask(client, chat, 400, messages=text)
    ask(client, chat, 400, messages=messages, tools=[{"type": SECRET}])
    ask(client, chat, 404, messages=messages, model="none")
    ask(client, completion, 400, prompt=text, structured_outputs={"regex": f"({SECRET}"})
    send_to_others(client, text)
    for body in (f'{{"prompt": "{SECRET}', f'{{"prompt": "{SECRET}"}}\xff', SECRET):
        answer = client.post(completion, content=body.encode("latin-1"))
        assert 400 <= answer.status_code < 500, answer.text
    answer = client.post(chat, content=SECRET * 4, headers={"Content-Type": f"text/{SECRET}"})
    assert 400 <= answer.status_code < 500
    wrong = {"Authorization": f"Bearer {WRONG_KEY}"}
    answer = client.post(chat, json={"messages": messages}, headers=wrong)
    assert answer.status_code == 401


def send_to_others(client: httpx.Client, text: str) -> None:
    """The same for the interfaces of Anthropic and for OpenAI's newer one."""
    anthropic, responses = "/v1/messages", "/v1/responses"
    messages = [{"role": "user", "content": text}]
    tool = {"name": f"find_{SECRET}", "description": SECRET, "input_schema": {"title": SECRET}}
    for stream in (False, True):
        more = {"messages": messages, "stream": stream, "max_tokens": 8}
        ask(client, anthropic, 200, system=SECRET, tools=[tool], stop_sequences=[SECRET], **more)
        ask(client, responses, 200, input=text, stream=stream, max_output_tokens=8)
    ask(client, f"{anthropic}/count_tokens", 200, messages=messages, tools=[tool])
    # Wrong ones.
    removed = {"type": "tool_removal", "tool": {"type": "tool_reference", "name": SECRET}}
    for path in (anthropic, f"{anthropic}/count_tokens"):
        for role in ("system", "user"):
            wrong = [*messages, {"role": role, "content": [removed]}]
            ask(client, path, 400, messages=wrong, tools=[tool | {"name": "other"}], max_tokens=8)
        ask(client, path, 400, messages=[{"role": SECRET, "content": text}], max_tokens=8)
    ask(client, anthropic, 400, messages=messages, tools=[{"name": SECRET}], max_tokens=8)
    long = [{"role": "user", "content": f"{SECRET} " * LONGEST}]
    ask(client, anthropic, 400, messages=long, max_tokens=8)
    ask(client, responses, 400, input=f"{SECRET} " * LONGEST)
    ask(client, responses, 400, input=[{"role": SECRET, "content": text}])
    schema = {"type": "json_schema", "name": SECRET, "schema": {"type": SECRET}}
    ask(client, responses, 400, input=text, text={"format": schema})


def leaks(server: Server) -> list[str]:
    """Lines of the log with a secret in them.

    At the level DEBUG, which docs/security.md warns of, vLLM says what is wrong with a request, and
    quotes it.
    """
    lines = server.log.read_text(errors="replace").splitlines()
    found = [line for line in lines if any(one in line for one in (SECRET, *KEYS))]
    return [line for line in found if not re.search(r" DEBUG .*/error_response\.py:", line)]


def test_no_line_of_the_log_has_a_prompt_or_a_key(server: Server, client: httpx.Client) -> None:
    send_everything(client)
    assert "DEBUG" in server.log.read_text()
    assert leaks(server) == []


def test_an_engine_that_fails_gives_nothing_away(server: Server, client: httpx.Client) -> None:
    """A worker ends while it has a request to compute, and vLLM logs what that was."""
    prompt = f"Spell {SECRET}"
    tokens = client.post("/tokenize", json={"prompt": prompt}).json()["tokens"]
    body = {"model": "tiny-moe", "prompt": prompt, "stop": [SECRET], "bad_words": [SECRET]}
    worker = workers(server)[0]
    os.kill(worker, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.post, "/v1/completions", json=body)
        time.sleep(2)  # The engine gives the request to its workers, and waits for them.
        os.kill(worker, signal.SIGKILL)
        assert answer.result().status_code >= 500
    server.ended()
    said = server.log.read_text(errors="replace")
    assert re.search(r"Dumping scheduler output .*NewRequestData\(", said)
    assert ", ".join(map(str, tokens)) not in said
    assert leaks(server) == []
