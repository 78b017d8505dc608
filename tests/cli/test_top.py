"""`lvllm top` as it is run: in a terminal, and in a pipe."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from typer.testing import CliRunner

from lvllm.cli.app import app
from tests.cli.pseudo_terminal import Terminal
from tests.top.fake_metrics import FakeMetrics, serving


def pipe(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["top", *arguments], env={"COLUMNS": "80"})
    return result.exit_code, result.output


@contextmanager
def terminal(server: FakeMetrics, *arguments: str) -> Iterator[Terminal]:
    shown = Terminal("top", "--url", server.url, *arguments, COLUMNS="80", LINES="24")
    try:
        yield shown
    finally:
        shown.close()


@pytest.mark.parametrize("arguments", [("--once",), (), ("--experts",), ("--bandwidth", "60")])
def test_a_pipe_gets_plain_text_once(arguments: tuple[str, ...]) -> None:
    with serving(experts=300, layers=64) as server:
        server.numbers[:] = 10
        code, output = pipe("--url", server.url, "--interval", "0.1", *arguments)
    assert code == 0, output
    assert "\x1b" not in output
    assert max(map(len, output.splitlines())) <= 80
    wanted = {
        "--experts": ["300 experts in 64 layers", "63  ▒▒▒▒▒", "times average"],
        "--bandwidth": ["of 60"],
    }.get(arguments[0] if arguments else "", [])
    usual = ["3 running", "25%", "offloaded  streamed", "node 1 0.0 GB/s", "10 queued"]
    for text in wanted or usual:
        assert text in output


def test_json() -> None:
    with serving(experts=3, layers=2) as server:
        server.numbers[40:] = [1, 2, 3, 4, 5, 6]
        code, output = pipe("--url", server.url, "--interval", "0.1", "--once", "--json")
        assert code == 0
        assert json.loads(output)["running"] == 3
        code, output = pipe("--url", server.url, "--once", "--json", "--experts")
    assert json.loads(output) == {"0": {"0": 1, "1": 2, "2": 3}, "1": {"0": 4, "1": 5, "2": 6}}


def test_a_terminal_sees_what_changes_until_the_server_ends() -> None:
    with serving() as server, terminal(server, "--interval", "0.1") as shown:
        shown.read_until("NaN stops")
        server.count(n17=41)
        shown.read_until("41")
        server.shutdown()
        server.server_close()
        last = shown.read_until("is a server there?")
        assert f"lvllm: {server.url}/metrics: " in last
        assert shown.exit_code() == 1


def test_ctrl_c_ends_it_quietly() -> None:
    with serving(experts=8, layers=3) as server:
        server.numbers[:] = 7
        with terminal(server, "--interval", "0.1", "--experts") as shown:
            shown.read_until("times average")
            shown.interrupt()
            assert shown.exit_code() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json"], "--json needs --once"),
        (["--url", "http://127.0.0.1:9"], "http://127.0.0.1:9/metrics: "),
        (["--url", "nowhere"], "nowhere/metrics: "),
    ],
)
def test_refused_in_one_line(arguments: list[str], message: str) -> None:
    code, output = pipe(*arguments)
    assert code == 1
    assert output.startswith(f"lvllm: {message}")
    assert len(output.strip().splitlines()) == 1


def test_a_server_without_routing_is_told_of() -> None:
    with serving() as server:
        code, output = pipe("--url", server.url, "--experts")
    assert code == 1
    assert output.strip().endswith("start it with LVLLM_METRICS_EXPERTS=1")
    assert len(output.strip().splitlines()) == 1
