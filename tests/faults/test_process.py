"""The one line that an error in a worker ends the server with."""

import subprocess
import sys
from pathlib import Path

import pytest

from lvllm.errors import LvllmError
from lvllm.faults import process
from lvllm.serving import command

CHILD = """
import sys
from lvllm.faults import process
process.end(sys.argv[1])
"""


@pytest.fixture
def front(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process as the front one of a server."""
    monkeypatch.setenv(process._VARIABLE, "0:0")  # not this process, and undone after the test
    process.prepare()


def worker(line: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CHILD, line],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(__file__).parents[2],
    )


def waiting(error: Exception | None) -> object:
    """Return what waiting for processes gives if vLLM's own waiting raises this."""

    def wait() -> str:
        if error is not None:
            raise error
        return "ready"

    return process.in_one_line(wait)()


@pytest.mark.usefixtures("front")
def test_the_front_process_ends_in_the_first_workers_line() -> None:
    for line in ("tensor 'a':\n  is damaged", "tensor 'b' is damaged"):
        done = worker(line)
        assert (done.returncode, done.stdout) == (1, "")
    with pytest.raises(LvllmError, match=r"^tensor 'a': is damaged$"):
        waiting(RuntimeError("Engine core initialization failed"))
    assert waiting(None) == "ready"


@pytest.mark.usefixtures("front")
def test_other_failures_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="initialization failed"):
        waiting(RuntimeError("Engine core initialization failed"))


@pytest.mark.usefixtures("front")
def test_a_worker_follows_one_that_has_said_why() -> None:
    process.follow()
    worker("tensor 'a' is damaged")
    with pytest.raises(SystemExit) as caught:
        process.follow()
    assert caught.value.code == 1


@pytest.mark.usefixtures("front")
def test_an_error_in_the_front_process_itself() -> None:
    with pytest.raises(LvllmError, match=r"^no$"):
        process.end("no")


@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("/venv/bin/vllm", SystemExit),
        ("/venv/lib/vllm/entrypoints/openai/api_server.py", SystemExit),
        (command.__file__, SystemExit),  # `lvllm serve` and `lvllm run`
        ("train.py", LvllmError),
        ("-c", LvllmError),
        ("", LvllmError),  # an interactive Python
    ],
)
def test_only_commands_exit(
    program: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [program])
    refusal = process.refusal("no")
    assert type(refusal) is error
    assert str(refusal).removeprefix("lvllm: ") == "no"


def test_a_worker_without_a_way_to_the_front_says_it_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(process._VARIABLE, "1:99")
    done = worker("tensor 'a' is damaged")
    assert (done.returncode, done.stdout) == (1, "lvllm: tensor 'a' is damaged\n")
