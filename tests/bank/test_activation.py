"""How systemd hands sockets to a bank; tests/e2e/test_bank.py does so to the command."""

import os
import subprocess
import sys
from pathlib import Path
from random import randrange

import pytest

from lvllm.bank import holder
from lvllm.bank.holder import Holder
from lvllm.handover import banks, sockets

TAKE = """
import os, sys
if sys.argv[1]:
    os.dup2(int(sys.argv[1]), 3)
os.environ |= {"LISTEN_FDS": "1", "LISTEN_PID": sys.argv[2] or str(os.getpid())}
from lvllm.bank.activation import inherited
from lvllm.errors import LvllmError
try:
    taken = inherited(os.environ)
    print([one.fileno() for one in taken], os.get_inheritable(3))
except LvllmError as error:
    print(error)
print([name for name in os.environ if name.startswith("LISTEN")])
"""
OURS = f"{banks.SOCKET}/{os.getpid()}"


def take(descriptor: int | None, process: str = "") -> list[str]:
    """What a process says that has got this descriptor, for itself or for another `process`."""
    number = "" if descriptor is None else str(descriptor)
    done = subprocess.run(
        [sys.executable, "-c", TAKE, number, process],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        pass_fds=() if descriptor is None else (descriptor,),
    )
    return done.stdout.splitlines()


def test_a_socket_is_taken_by_the_process_that_it_is_for() -> None:
    listening = sockets.bind(OURS)
    assert listening is not None
    with listening:
        # No child of the process gets it.
        assert take(listening.fileno()) == ["[3] False", "[]"]
        assert take(listening.fileno(), "1") == ["[] True", "[]"]


def test_a_socket_at_which_no_server_looks_is_refused(tmp_path: Path) -> None:
    listening = sockets.bind(f"lvllm/test/{randrange(1 << 60)}")
    assert listening is not None
    with listening:
        said = take(listening.fileno())[0]
    assert said.startswith("LISTEN_FDS: descriptor 3 has the name '@lvllm/test/")
    assert said.endswith(f"look for ListenSequentialPacket=@{banks.SOCKET}")
    with (tmp_path / "file").open("w") as file:
        assert take(file.fileno())[0].startswith("LISTEN_FDS: descriptor 3: Socket operation on")
    assert take(None)[0] == "LISTEN_FDS: descriptor 3: Bad file descriptor"


def test_a_bank_answers_at_its_own_name_and_at_the_inherited_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The inherited socket goes on listening when the bank ends."""
    name = f"lvllm/test/{os.getpid()}/{randrange(1 << 60)}"
    for module in (banks, holder):
        monkeypatch.setattr(module, "PREFIX", f"{name}/bank/")
    monkeypatch.setattr(banks, "SOCKET", f"{name}/socket")
    assert not banks.wake()
    listening = sockets.bind(f"{name}/socket/1")
    assert listening is not None
    with listening:
        made = Holder("some/model", lambda status: None, [listening])
        banks.tell(made.name, {"loads": name, "ranks": 1, "identity": {}})
        assert banks.wake()
        assert [bank.name for bank in banks.banks()] == [name]
        made.close()
        assert banks.banks() == []
        sockets.connect(f"{name}/socket/1").close()
