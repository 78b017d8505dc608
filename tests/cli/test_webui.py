"""`lvllm webui`, as far as it shows no page; tests/e2e/test_webui.py has the page."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lvllm.cli.app import app
from tests.chat.fake_server import WAIT, serving

COMMAND = "from lvllm.cli import main; main()"
NOBODY = "http://127.0.0.1:9/v1"


def refused(*arguments: str) -> str:
    """The one line in which `lvllm webui ARGUMENTS` ends."""
    result = CliRunner().invoke(app, ["webui", *arguments], env={"OPENAI_API_KEY": "sk-secret"})
    assert result.exit_code == 1
    (line,) = result.output.strip().splitlines()
    assert line.startswith("lvllm: ")
    assert "sk-secret" not in line
    return line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--url", NOBODY], f"no server answers at {NOBODY}"),
        (["--url", "nowhere"], "--url 'nowhere' is not allowed: http://HOST:PORT/v1"),
        (["examples/models/tiny-moe", "--url", NOBODY], "--url names a server that runs already"),
        (["--verify", "--url", NOBODY], "--url names a server that runs already"),
        (["--host", "nowhere.invalid", "--url", NOBODY], "--host nowhere.invalid --port 7860"),
        (["missing"], "missing"),
    ],
)
def test_refusals_in_one_line(arguments: list[str], message: str) -> None:
    assert message in refused(*arguments)


def test_a_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        line = refused("--url", NOBODY, "--port", port)
    assert f"--port {port} cannot be taken: Address already in use" in line


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_nothing_stays_of_a_page_that_is_ended_while_it_loads(
    how: signal.Signals, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        page = subprocess.Popen(
            [sys.executable, "-c", COMMAND, "webui", "--url", url, "--port", "0"],
            env=os.environ | {"TMPDIR": str(tmp_path)},
            stderr=subprocess.PIPE,
            text=True,
        )
        connected, _ = silent.accept()  # It asks for the models, and waits for the answer.
        with connected:
            (pictures,) = tmp_path.iterdir()
            assert pictures.name.startswith("lvllm-webui-")
            page.send_signal(how)
            _, errors = page.communicate(timeout=WAIT)
    assert list(tmp_path.iterdir()) == []
    assert (page.returncode, errors) == (0, "")


def test_a_server_without_a_model() -> None:
    with serving() as server:
        server.models = {"data": []}
        assert "names no model" in refused("--url", server.url)


def test_without_gradio_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec

    def find(name: str, package: str | None = None) -> Any:
        return None if name == "gradio" else found(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    assert refused().endswith("webui needs gradio: pip install 'vllm[webui]' installs it")
