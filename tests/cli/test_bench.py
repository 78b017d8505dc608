"""`lvllm bench` as its user runs it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lvllm.bench.comparison import Report
from lvllm.cli.app import app
from tests.serving.test_background import ends

REPOSITORY = Path(__file__).parents[2]
BENCH = [sys.executable, "-c", "from lvllm.cli.app import main; main()", "bench"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--users", "1,x"], "'1,x' is no list of whole numbers"),
        (["--prompt", "0"], "'0': numbers are at least 1"),
        (["--answer", "1"], "Invalid value for '--answer'"),
    ],
)
def test_wrong_options(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["bench", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert said in result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--plot", "a.txt"], r"--plot a.txt: the name has to end with .png, .svg, .pdf$"),
        (["--plot", "nowhere/a.png"], r"there is no folder nowhere$"),
        (["--url", "http://127.0.0.1:1", "--stock"], r"with --url, a server runs already"),
        (["--url", "http://127.0.0.1:1", "m", "--seed", "1"], r"with --url"),
        (["nowhere/at/all"], r"nowhere/at/all: no such folder"),
    ],
)
def test_refusals(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert isinstance(result.exception, SystemExit)
    message = str(result.exception.code)
    assert message.startswith("lvllm: ")
    assert "\n" not in message
    assert re.search(said, message)


@pytest.mark.slow
def test_the_demo_model(tmp_path: Path) -> None:
    """A server is started, measured and stopped; a second bench is killed while its server runs."""
    picture = tmp_path / "speed.svg"
    command = [*BENCH, "--users", "1,3", "--prompt", "40", "--answer", "24", "--json"]
    done = subprocess.run(
        [*command, "--plot", str(picture)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env=os.environ | {"HTTP_PROXY": "http://127.0.0.1:9"},  # Nothing answers there.
    )
    assert done.returncode == 0, done.stderr
    report = Report.model_validate(json.loads(done.stdout))
    assert report.way == "everything on the CPU"
    assert [(row.measured.users, row.measured.requests) for row in report.rows] == [(1, 4), (3, 6)]
    for row in report.rows:
        one = row.measured
        assert 38 <= one.prompt <= 44  # Random words may become one token more or less.
        assert 0 < one.first_token.p50 <= one.first_token.p99 < one.whole.p99
        assert one.output_rate > 0
        assert row.planned is not None
    alone = report.rows[0].measured
    assert alone.prefill_rate is not None
    assert alone.decode_rate is not None
    # Of a whole answer all tokens but the first come at the decode rate.
    assert alone.decode_rate == pytest.approx(23 / (alone.whole.p50 - alone.first_token.p50), rel=1)
    assert "stock" not in picture.read_text()


@pytest.mark.slow
def test_killed_while_the_server_starts(tmp_path: Path) -> None:
    """Nothing of it lives on: neither the server nor the load generator."""
    process = subprocess.Popen(
        [*BENCH, "--users", "1"],
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    try:
        children: list[int] = []
        deadline = time.monotonic() + 60
        while len(children) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
            found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
            children = [int(child) for child in found.split()]
        assert len(children) >= 2
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert all(ends(child) for child in children)
