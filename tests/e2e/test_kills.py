"""Servers whose processes are killed: who is left, what is said, and what lies around."""

import os
import random
import signal
import stat
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import openai
import pytest

from tests.e2e.generate import TINY
from tests.e2e.server import END_SECONDS, CommandServer, Server, title

ARGUMENTS = (str(TINY), "--max-model-len", "512", "--enforce-eager")


@pytest.fixture(scope="module")
def temporary() -> Iterator[Path]:
    """The folder for temporary files of all servers here."""
    with TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


def start(log: Path, temporary: Path, kind: type[Server] = Server) -> Server:
    return kind(log, *ARGUMENTS, TMPDIR=str(temporary), VLLM_CPU_KVCACHE_SPACE="1")


def left(temporary: Path) -> list[Path]:
    """What processes use to find each other."""
    found = [*temporary.glob("vllm_dist_*"), *temporary.glob("lvllm-server-*")]
    return found + [path for path in temporary.iterdir() if stat.S_ISSOCK(path.stat().st_mode)]


def named(server: Server, name: str) -> int:
    """The process that vLLM calls so.

    While it starts another program, that process has its title for a moment, too.
    """
    until = time.monotonic() + END_SECONDS
    while len(found := [pid for pid in server.processes() if name in title(pid)]) != 1:
        assert time.monotonic() < until, (name, found, server.said())
        time.sleep(0.01)
    return found[0]


def test_all_processes_end_with_a_killed_front_process(temporary: Path, tmp_path: Path) -> None:
    with start(tmp_path / "log", temporary).ready() as server:
        assert named(server, "EngineCore")
        assert named(server, "Worker")
        assert len(left(temporary)) == 1
        os.kill(server.process.pid, signal.SIGKILL)
        server.ended()


def test_an_engine_ends_before_it_knows_its_front_process(temporary: Path, tmp_path: Path) -> None:
    """It has a title, and waits for an answer that tells it what to load."""
    with start(tmp_path / "log", temporary) as server:
        while not any("VLLM::EngineCore" in title(pid) for pid in server.processes()):
            assert server.process.poll() is None, server.said()
            time.sleep(0.01)
        os.kill(server.process.pid, signal.SIGKILL)
        server.ended()


def test_a_killed_engine_is_named(temporary: Path, tmp_path: Path) -> None:
    with start(tmp_path / "log", temporary, CommandServer).ready() as server:
        # The folder of the server before has gone, too.
        assert len(left(temporary)) == 1
        with ThreadPoolExecutor(1) as pool:
            engine = named(server, "EngineCore")
            os.kill(engine, signal.SIGSTOP)  # Otherwise a fast CPU has answered by then.
            vain = pool.submit(server.ask, [[5, 6, 7]], 480)
            time.sleep(1)
            os.kill(engine, signal.SIGKILL)
            with pytest.raises(openai.APIError):
                vain.result()
        server.ended()
        assert server.process.wait() == 1
        said = server.log.read_text()
        assert said.count("lvllm: the process EngineCore was ended by SIGKILL") == 1, said
    assert not left(temporary)


@pytest.mark.parametrize(
    ("process", "number", "said"),
    [
        ("Worker", signal.SIGKILL, "the process VllmWorker-0 was ended by SIGKILL"),
        ("EngineCore", signal.SIGTERM, "the process EngineCore has ended with status 0"),
    ],
)
def test_a_server_without_its_engine_fails(
    process: str, number: int, said: str, temporary: Path, tmp_path: Path
) -> None:
    """However the engine ends, a supervisor has to know that nobody asked for it."""
    with start(tmp_path / "log", temporary).ready() as server:
        with ThreadPoolExecutor(1) as pool:
            worker = named(server, "Worker")
            os.kill(worker, signal.SIGSTOP)  # Otherwise a fast CPU has answered by then.
            vain = pool.submit(server.ask, [[5, 6, 7]], 480)
            time.sleep(1)
            os.kill(named(server, process), number)
            os.kill(worker, signal.SIGCONT)
            with suppress(openai.APIError):  # The engine may answer before it ends.
                vain.result()
        server.ended()
        assert server.process.wait() == 1
        lines = [line for line in server.log.read_text().splitlines() if "lvllm: " in line]
        assert len(lines) == 1, server.said()
        assert lines[0] == f"lvllm: {said}, so the server ends"
    assert not left(temporary)


@pytest.mark.parametrize(
    ("process", "number", "name"),
    [("Worker", signal.SIGKILL, "VllmWorker-0"), ("EngineCore", signal.SIGTERM, "EngineCore")],
)
def test_a_process_that_is_killed_while_it_loads_is_named(
    process: str, number: signal.Signals, name: str, temporary: Path, tmp_path: Path
) -> None:
    with start(tmp_path / "log", temporary, CommandServer) as server:
        while not any(f"VLLM::{process}" in title(pid) for pid in server.processes()):
            assert server.process.poll() is None, server.said()
            time.sleep(0.05)
        time.sleep(random.uniform(0, 1))
        os.kill(named(server, f"VLLM::{process}"), number)
        server.ended()
        said = server.log.read_text()
        assert f"lvllm: the process {name} was ended by {number.name}, so the server ends" in said
        assert server.process.wait() == 1
    assert not left(temporary)


@pytest.mark.parametrize("servers", [1, 2])
def test_a_killed_coordinator_is_named(servers: int, temporary: Path, tmp_path: Path) -> None:
    """Of two replicas, with one process that answers requests and with one for each replica."""
    replicas = ("--data-parallel-size", "2", "--api-server-count", str(servers))
    variables = {"TMPDIR": str(temporary), "VLLM_CPU_KVCACHE_SPACE": "1"}
    with Server(tmp_path / "log", *ARGUMENTS, *replicas, **variables).ready() as server:
        os.kill(named(server, "DPCoordinator"), signal.SIGKILL)
        server.ended()
        assert server.process.wait() == 1
        said = server.log.read_text()
        line = "lvllm: the process VLLM_DP_Coordinator was ended by SIGKILL, so the server ends"
        assert said.count(line) == 1, said
    assert not left(temporary)


def test_sigterm_ends_a_start(temporary: Path, tmp_path: Path) -> None:
    """At any moment: the engine may not exist yet, or load the model."""
    with start(tmp_path / "log", temporary) as server:
        while "Initializing a V1 LLM engine" not in server.log.read_text():
            assert server.process.poll() is None, server.said()
            time.sleep(0.1)
        time.sleep(random.uniform(0, 6))
        os.kill(server.process.pid, signal.SIGTERM)
        server.ended(END_SECONDS)
        said = server.log.read_text()
        # A fast machine is ready by then, and ends as any server.
        if "Application startup complete" not in said:
            assert "lvllm: SIGTERM has stopped the start" in said
            assert server.process.wait() == 128 + signal.SIGTERM
            assert "Traceback" not in said
    assert not left(temporary)
