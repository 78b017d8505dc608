"""A bank's holder with layers of random bytes, which a thread deposits."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from random import randrange
from threading import Timer
from typing import Any

import pytest
import torch

from lvllm import sharing
from lvllm.bank import holder
from lvllm.bank.holder import Holder
from lvllm.bank.notify import notify
from lvllm.errors import LvllmError
from lvllm.handover import banks, sockets
from lvllm.handover.banks import Bank

SIZE = 2 << 20
"""Shared memory is in whole huge pages."""
IDENTITY = {"dtype": "torch.bfloat16", "tensor-parallel-size": "1", "files": "0" * 128}
FOLLOWER = """
import sys
from lvllm.handover import sockets
connection = sockets.connect(sys.argv[1])
sockets.send(connection, sys.argv[2])
print(sockets.receive(connection)[0] if sys.argv[3:] else "asked", flush=True)
sys.stdin.readline()
"""
HOLDER = """
import sys
from lvllm.bank import holder
holder.PREFIX = sys.argv[1]
print(holder.Holder("some/model", lambda status: None).name, flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def name() -> str:
    """Under which experts are shared."""
    return f"lvllm/test/{os.getpid()}/{randrange(1 << 60)}"


@pytest.fixture
def held(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Holder]:
    """A bank that waits for layers of two ranks."""
    monkeypatch.setattr(banks, "PREFIX", f"{name}/bank/")
    monkeypatch.setattr(holder, "PREFIX", f"{name}/bank/")
    made = Holder("some/model", lambda status: None)
    banks.tell(made.name, {"loads": name, "ranks": 2, "identity": IDENTITY})
    yield made
    made.close()


def deposit(bank: str, name: str, layer: str) -> torch.Tensor:
    """What a worker of the loader does; the memory is the bank's alone afterwards."""
    values = torch.randint(0, 256, (SIZE,), dtype=torch.uint8)
    place = {"in": 0, "at": 64, "dtype": "bfloat16", "shape": [3, 5, 11]}
    message = {"areas": [SIZE], "stored": {"format": "bf16", "w13": place}}
    descriptor = os.memfd_create("lvllm-experts")
    with open(descriptor, "wb") as file:
        file.write(values.numpy().tobytes())
        file.flush()
        told: dict[str, Any] = {"deposit": layer, "name": f"{name}/0", "message": message}
        banks.tell(bank, told, [file.fileno()])
    return values[64 : 64 + 330].view(torch.bfloat16).view(3, 5, 11)


def unchecked(name: str, message: dict[str, Any]) -> Any:
    """What a bank answers to somebody who does not ask who it is."""
    with sockets.connect(name) as connection:
        sockets.send(connection, message)
        return sockets.receive(connection)


def follower(name: str) -> sharing.Follower:
    return sharing.Follower(f"{name}/0", sockets.connect(f"{name}/0"))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int16)


def until(condition: Any) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def attach(name: str, layer: str, *answered: str) -> "subprocess.Popen[str]":
    """A process that has asked for a layer, and with `answered` got it."""
    process = subprocess.Popen(
        [sys.executable, "-c", FOLLOWER, f"{name}/0", layer, *answered],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline()
    return process


def test_layers_that_servers_take_while_and_after_they_are_loaded(held: Holder, name: str) -> None:
    first = follower(name)
    got = []
    waits = threading.Thread(target=lambda: got.append(first.receive("a")))
    waits.start()
    values = deposit(held.name, name, "a")
    waits.join()
    assert torch.equal(bits(got[0]["w13"]), bits(values))
    more = deposit(held.name, name, "b")
    (status,) = banks.banks()
    assert (status.state, status.layers, status.bytes) == ("loading", 2, 2 * SIZE)
    banks.tell(held.name, {"loaded": True})
    assert torch.equal(bits(follower(name).receive("b")["w13"]), bits(more))
    with pytest.raises(ValueError, match=rf"^c: process {os.getpid()} has no .* a layer that"):
        first.receive("c")
    (status,) = banks.banks(identified=True)
    assert status == held.status
    assert (status.state, status.formats, status.ranks) == ("ready", ("bf16",), 2)
    assert (status.name, status.identity, status.pid) == (name, IDENTITY, os.getpid())
    held.close()
    assert torch.equal(bits(got[0]["w13"]), bits(values))  # It is mapped here.
    assert banks.banks() == []
    assert not sharing.is_taken(name)


def test_servers_that_are_killed(held: Holder, name: str) -> None:
    """One that has a layer and one that waits for one. Others get their layers all the same."""
    values = deposit(held.name, name, "a")
    processes = [attach(name, "a", "answered"), attach(name, "b")]
    until(lambda: held.status.attached == tuple(sorted(one.pid for one in processes)))
    for process in processes:
        process.kill()
        process.wait()
    deposit(held.name, name, "b")
    until(lambda: held.status.attached == ())
    assert torch.equal(bits(follower(name).receive("a")["w13"]), bits(values))


def test_a_bank_that_is_killed(name: str) -> None:
    """Its memory outlives it where it is mapped, and its names are free again."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, f"{name}/bank/"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        bank = process.stdout.readline().strip()
        banks.tell(bank, {"loads": name, "ranks": 1, "identity": IDENTITY})
        values = deposit(bank, name, "a")
        waiting = follower(name)
        assert waiting.process == process.pid
        got = waiting.receive("a")["w13"]
        Timer(0.2, process.kill).start()
        with pytest.raises(ValueError, match=rf"^b: process {process.pid}, .* ended before"):
            waiting.receive("b")
    assert torch.equal(bits(got), bits(values))
    assert sockets.holder_of(f"{name}/0") is None
    with pytest.raises(OSError, match="refused"):
        banks.tell(bank, {"ask": "status"})


def test_a_server_that_waits_is_told_why_the_bank_ends(held: Holder, name: str) -> None:
    said: list[str] = []

    def wait() -> None:
        try:
            follower(name).receive("a")
        except ValueError as error:
            said.append(str(error))

    waits = threading.Thread(target=wait)
    waits.start()
    until(lambda: held.status.attached)
    banks.tell(held.name, {"failed": "model.safetensors is damaged"})
    waits.join()
    assert said[0].endswith("has no such experts: model.safetensors is damaged")
    assert held.failure == "model.safetensors is damaged"


def test_a_second_bank_of_the_same_experts(held: Holder, name: str) -> None:
    other = Holder("some/model", lambda status: None)
    with pytest.raises(LvllmError, match=rf"^process {os.getpid()} holds these experts already"):
        banks.tell(other.name, {"loads": name, "ranks": 1, "identity": IDENTITY})
    assert len(banks.banks()) == 2
    other.close()
    assert len(banks.banks()) == 1


def test_another_users_process_is_no_bank(held: Holder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any user may take an abstract name, and connect to one."""
    assert [one.pid for one in banks.banks()] == [os.getpid()]
    real = sockets.peer
    monkeypatch.setattr(sockets, "peer", lambda connection: (real(connection)[0], os.getuid() + 1))
    assert banks.banks() == []
    with pytest.raises(PermissionError, match="belongs to another user's process"):
        banks.tell(held.name, {"failed": "false"})
    with pytest.raises((EOFError, OSError)):  # The bank may hang up before it is told anything.
        unchecked(held.name, {"failed": "false"})
    assert held.failure is None


def test_what_differs() -> None:
    other = IDENTITY | {"tensor-parallel-size": "2", "files": "1" * 128, "more": "x"}
    assert banks.differences(IDENTITY, IDENTITY) == []
    assert banks.differences(IDENTITY, other) == [
        "tensor-parallel-size is 2 there and 1 here",
        "files differs",
        "more is x there and unknown here",
    ]


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, abstract: bool) -> None:
    notify("READY=1")  # Without systemd nothing happens.
    path = f"@lvllm/test/{randrange(1 << 60)}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(path.replace("@", "\0"))
        monkeypatch.setenv("NOTIFY_SOCKET", path)
        notify("READY=1")
        assert systemd.recv(100) == b"READY=1"


def test_list_and_stop(held: Holder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from lvllm.cli import bank as command

    def cli(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(command.bank, arguments, env={"COLUMNS": "160"})
        return result.exit_code, f"{result.output}{result.exception or ''}"

    code, said = cli("list")
    assert code == 0
    for text in ("some/model", "loading", str(os.getpid())):
        assert text in said
    assert Bank.model_validate_json(cli("list", "--json")[1].strip("[]\n")) == held.status
    assert (
        "no bank of other/model: the banks here are some/model (process"
        in cli("stop", "other/model")[1]
    )
    # The bank of a folder is named by any path to it.
    monkeypatch.chdir(tmp_path)
    with subprocess.Popen(["sleep", "600"]) as process:
        other = held.status.model_copy(update={"model": str(tmp_path), "pid": process.pid})
        monkeypatch.setattr(command, "banks", lambda: [held.status, other])
        assert "2 banks of any model" in cli("stop")[1]
        assert cli("stop", ".") == (0, f"lvllm: the bank of {tmp_path} has ended\n")
        assert process.wait() == -signal.SIGTERM
