"""The server of the page, as programs ask it; tests/e2e/test_webui.py has it in a browser."""

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from lvllm.chat.client import Client
from lvllm.errors import LvllmError
from lvllm.serving.progress import Weights
from lvllm.webui.answering import Answering
from lvllm.webui.site import Site, serving
from tests.chat.fake_server import WAIT
from tests.chat.fake_server import serving as fake_server


def get(url: str) -> httpx.Response:
    return httpx.get(url, timeout=WAIT, trust_env=False)


def events(site: Site) -> Iterator[dict[str, Any]]:
    """What the page is told while it is open."""
    with httpx.stream("GET", f"{site.url}progress", timeout=WAIT, trust_env=False) as answer:
        for line in answer.iter_lines():
            if line:
                yield json.loads(line.removeprefix("data: "))


def check_headers(answer: httpx.Response) -> dict[str, str]:
    """Check what all answers have. Returns the policy by its directives."""
    assert answer.status_code == 200
    assert answer.headers["x-frame-options"] == "DENY"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cross-origin-opener-policy"] == "same-origin"
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    assert "server" not in answer.headers
    parts = answer.headers["content-security-policy"].split("; ")
    policy = {name: sources for name, _, sources in (part.partition(" ") for part in parts)}
    assert policy["default-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["object-src"] == "'none'"
    assert "http" not in answer.headers["content-security-policy"]
    assert "*" not in answer.headers["content-security-policy"]
    return policy


def test_the_page_of_the_loading_runs_no_foreign_script() -> None:
    with serving("127.0.0.1", 0) as site:
        for path in ("", "loading.js", "loading.css"):
            answer = get(site.url + path)
            assert "script-src" not in check_headers(answer)  # default-src holds: no inline ones.
            assert answer.headers["cache-control"] == "no-store"
        assert "<script>" not in get(site.url).text
        assert get(f"{site.url}page.js").status_code == 404


def test_the_chat_may_load_from_its_own_origin_only() -> None:
    from lvllm.webui.page import application, page

    with fake_server() as server, serving("127.0.0.1", 0) as site:
        site.open(application(page(Answering(Client(server.url)), ["a/model"], "")))
        for path in ("", "config", "theme.css", "static/img/logo.svg"):
            policy = check_headers(get(site.url + path))
        assert policy["img-src"] == "'self' data: blob:"
        assert "unsafe-eval" not in policy["script-src"]
        assert get(f"{site.url}docs").status_code == 404
        assert get(f"{site.url}openapi.json").status_code == 404


def test_what_the_page_is_told_until_the_chat() -> None:
    ran = []

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        ran.append("began")
        yield
        ran.append("ended")

    chat = Starlette(routes=[Route("/", lambda _: PlainTextResponse("chat"))], lifespan=lifespan)
    with serving("127.0.0.1", 0) as site:
        told = events(site)
        first = next(told)
        assert (first["state"], first["text"]) == ("starting", "Starting the server")
        assert first["seconds"] >= 0
        site.loading.show(None)
        site.loading.show(Weights(45, "1.15 GiB", "2.55 GiB"))
        second = next(told)
        assert second["text"] == "Loading the weights: 1.15 GiB of 2.55 GiB"
        assert second["percent"] == 45
        assert second["seconds"] >= first["seconds"]
        site.loading.show(Weights(100, "2.55 GiB", "2.55 GiB"))
        assert next(told)["text"].startswith("All weights are loaded (2.55 GiB)")
        site.open(chat)
        assert ran == ["began"]
        assert [one["state"] for one in told] == ["ready"]
        assert get(site.url).text == "chat"
        site.loading.end("late")
    assert ran == ["began", "ended"]


def test_a_failure_is_told_before_the_server_ends() -> None:
    with pytest.raises(LvllmError, match=r"^why$"), serving("127.0.0.1", 0) as site:  # noqa: PT012
        told = events(site)
        assert next(told)["state"] == "starting"
        raise LvllmError("why")
    last = list(told)
    assert [(one["state"], one["text"]) for one in last] == [("failed", "why")]
    with pytest.raises(httpx.ConnectError):
        get(site.url)


def test_a_chat_that_cannot_begin_raises_its_error() -> None:
    async def refuse() -> None:
        raise RuntimeError("no chat")

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        await refuse()
        yield

    with serving("127.0.0.1", 0) as site, pytest.raises(RuntimeError, match="no chat"):
        site.open(Starlette(lifespan=lifespan))
