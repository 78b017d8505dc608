"""A bank and engines that use its experts: started, killed, started again, stopped."""

import json
import os
import random
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from lvllm.handover import sockets
from lvllm.handover.banks import SOCKET, banks
from tests.e2e.generate import ONE_PROCESS, TINY
from tests.e2e.sharing_engine import Engine

COMMAND = [sys.executable, "-c", "from lvllm.cli import main; main()", "bank"]


OPTIONS = ("--skip-tokenizer-init", "--dtype", "bfloat16")
# What systemd does before it runs a command: descriptor 3 is the socket that it listens at.
ACTIVATE = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ |= {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid())}
os.execv(sys.argv[2], sys.argv[2:])
"""


def start(
    log: Path, *options: str, listening: socket.socket | None = None
) -> "subprocess.Popen[str]":
    """A bank of the small model, which prints its states."""
    command = [*COMMAND, str(TINY), "--json", *OPTIONS, *options]
    descriptors = () if listening is None else (listening.fileno(),)
    for descriptor in descriptors:
        command = [sys.executable, "-c", ACTIVATE, str(descriptor), *command]
    with log.open("w") as errors:
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | ONE_PROCESS,
            pass_fds=descriptors,
        )


class Activation:
    """Listens as systemd does, and starts a bank at the first connection."""

    def __init__(self, log: Path) -> None:
        self.banks: list[subprocess.Popen[str]] = []
        listening = sockets.bind(f"{SOCKET}/{os.getpid()}")
        assert listening is not None
        self.listening = listening
        Thread(target=self._start, args=(log,), daemon=True).start()

    def _start(self, log: Path) -> None:
        select.select([self.listening], [], [])
        self.banks.append(start(log, listening=self.listening))


def until(condition: Callable[[], Any]) -> Any:
    """What the condition returns, once that is true."""
    end = time.monotonic() + 60
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def children(process: int) -> list[int]:
    """The processes that this one, and those, have started."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(file.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == process:
            found += [int(file.parent.name), *children(int(file.parent.name))]
    return found


def exists(process: int) -> bool:
    """Whether a process has not ended."""
    try:
        return ") Z " not in Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False


@pytest.mark.alone  # Meanwhile, other servers of this user that share experts would be refused.
def test_a_bank_outlives_engines(tmp_path: Path) -> None:
    """Engines have the tokens and probabilities that they have alone, however others end. The first
    one that looks for a bank starts it.
    """
    prompts = [[random.randrange(3, 40) for _ in range(n)] for n in (5, 17)]
    shared = [(TINY, {"share_experts": 1})]
    killed, activation = start(tmp_path / "killed"), Activation(tmp_path / "log")
    engines: list[Engine] = []

    def engine(kinds: list[tuple[Path, dict[str, Any]]]) -> Engine:
        engines.append(Engine(kinds, prompts))
        return engines[-1]

    try:
        # The guardian and the loader end with a bank that is killed while it starts.
        started = until(lambda: len(found := children(killed.pid)) >= 2 and found)
        killed.kill()
        killed.wait()
        expected, mapped, _ = engine([(TINY, {})]).answer()
        assert mapped == 0
        assert banks() == []
        assert activation.banks == []  # To ask who is there starts none.
        # The first engine waits until the bank has loaded its layers.
        for _ in range(2):
            attached = engine(shared)
            steps, mapped, _ = attached.answer()
            assert steps == expected
            assert mapped > 0
            assert not attached.loaded()
            # The engine may have its last layer before the bank knows that it was the last one.
            until(lambda: banks()[0].state == "ready")
            (one,) = banks()
            (bank,) = activation.banks
            assert (one.model, one.pid) == (str(TINY), bank.pid)
            assert (one.formats, one.layers) == (("bf16",), 4)
            assert one.attached == (attached.child.pid,)
            attached.kill()
            until(lambda: banks()[0].attached == ())
        last = engine(shared)
        assert last.answer()[0] == expected
        said = subprocess.run([*COMMAND, "stop"], stdout=subprocess.PIPE, text=True, check=True)
        assert f"processes {last.child.pid} keep the memory" in said.stdout
        states, _ = bank.communicate(timeout=60)
        assert bank.returncode == 0
        assert json.loads(states.splitlines()[-1]) == {"state": "stopped"}
        last.tell("again")
        steps, mapped, share = last.answer()
        assert (steps, share) == (expected, mapped)
        assert not any(map(exists, started))
    finally:
        for one_engine in engines:
            one_engine.kill()
        activation.listening.close()
        for process in (*activation.banks, killed):
            process.terminate()
            process.wait()
    assert not [name for name in os.listdir("/dev/shm") if "lvllm" in name]
