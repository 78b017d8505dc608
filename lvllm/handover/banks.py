"""The banks of this user on this host: who they are, what they hold, and what differs.

A bank is a process that holds the experts of a model for servers (`lvllm.bank`). It listens under a
name that begins with `PREFIX`, and the kernel lists such names in /proc/net/unix.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from lvllm.errors import LvllmError
from lvllm.handover import sockets

__all__ = ["LOADS_FOR", "PREFIX", "SOCKET", "Bank", "banks", "differences", "tell", "wake"]

PREFIX = f"lvllm/{os.getuid()}/bank/"
SOCKET = f"lvllm/{os.getuid()}/bank-socket"
"""How the names begin at which systemd listens and starts a bank (`lvllm.bank.activation`). `banks`
does not ask there, since that would start one."""
LOADS_FOR = "_LVLLM_BANK"
"""The environment variable with the name of the bank for which this process loads experts."""
ANSWER_SECONDS = 300
"""How long a bank that was just started may take to say what it will hold. It imports vLLM and
reads the configuration first: 12 s on 2 idle cores, and minutes on a busy machine."""
LONGEST = 80
"""Longer values than this are not shown."""


class Bank(BaseModel):
    """What a bank says of itself."""

    model_config = ConfigDict(frozen=True)

    model: str
    state: Literal["starting", "loading", "ready"]
    """Before `loading`, the bank does not know yet what it will hold."""
    pid: int
    """The process, as the asking process sees it."""
    started: float
    """The time of its start, in seconds since 1970."""
    name: str | None = None
    """The name under which servers share these experts."""
    identity: dict[str, str] = {}
    """What servers must have in common (`lvllm.sharing.identity_of`)."""
    ranks: int = 0
    layers: int = 0
    """How many layers are there, each rank's counted by themselves."""
    bytes: int = 0
    """The memory of these layers."""
    formats: tuple[str, ...] = ()
    """The weight formats of these layers."""
    attached: tuple[int, ...] = ()
    """The processes that use these layers: one for each rank of a server."""


def banks(*, identified: bool = False) -> list[Bank]:
    """All banks of this user, oldest first.

    With `identified`, this waits up to five minutes until each of them knows what it will hold.
    Raises LvllmError for a bank that does not answer in that time.
    """
    found = []
    for name in _names(PREFIX):
        said = _ask(name, "identity" if identified else "status")
        if said is not None:
            # A bank in another container has another number there.
            pid = sockets.holder_of(name) or said["pid"]
            found.append(Bank.model_validate(said | {"pid": pid}))
    return sorted(found, key=lambda bank: bank.started)


def wake() -> bool:
    """Let systemd start the banks for which it listens; return whether there is one.

    This waits up to five minutes until each of them knows what it will hold, and is one of `banks`.
    Raises LvllmError for a bank that does not answer in that time.
    """
    woken = [_ask(name, "identity") for name in _names(SOCKET)]
    return any(status is not None for status in woken)


def _ask(name: str, what: str) -> dict[str, object] | None:
    """The status of the bank that listens under `name`.

    None if it has just ended, or if another user's process has the name.
    """
    try:
        return tell(name, {"ask": what})
    except TimeoutError:
        raise LvllmError(
            f"the bank of process {sockets.holder_of(name)} has not answered for {ANSWER_SECONDS} s"
        ) from None
    except OSError:
        return None


def tell(
    name: str, message: dict[str, object], descriptors: list[int] | None = None
) -> dict[str, object]:
    """Send a message to the bank that listens under `name`. Returns its answer.

    Raises OSError if it does not answer or is another user's process, LvllmError with the bank's
    reason if it refuses.
    """
    with sockets.connect(name) as connection:
        if not sockets.is_trusted(connection):
            raise PermissionError(f"{name} belongs to another user's process")
        connection.settimeout(ANSWER_SECONDS)
        sockets.send(connection, message, descriptors)
        try:
            answer, _ = sockets.receive(connection)
        except EOFError:
            raise ConnectionResetError(f"{name} has ended") from None
    if "error" in answer:
        raise LvllmError(answer["error"])
    return dict(answer)


def differences(here: Mapping[str, str], there: Mapping[str, str]) -> list[str]:
    """What differs between what is wanted `here` and what a bank has `there`, in words."""
    found = []
    for what in [*here, *(what for what in there if what not in here)]:
        mine, its = here.get(what, "unknown"), there.get(what, "unknown")
        if mine == its:
            continue
        shown = max(len(mine), len(its)) <= LONGEST
        found.append(f"{what} is {its} there and {mine} here" if shown else f"{what} differs")
    return found


def _names(prefix: str) -> list[str]:
    """The names that begin so under which somebody of this host listens."""
    try:
        lines = Path("/proc/net/unix").read_text().splitlines()
    except OSError:
        return []
    names = {line.split()[7][1:] for line in lines if f" @{prefix}" in line}
    return sorted(names)
