"""Runs a bank until it is told to end, or its loading fails."""

import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager

from lvllm.bank.activation import inherited
from lvllm.bank.holder import Holder
from lvllm.bank.notify import notify
from lvllm.errors import LvllmError
from lvllm.handover.banks import LOADS_FOR, Bank
from lvllm.serving import guardian

__all__ = ["run"]

STOPPED = "the bank was stopped"
"""What servers are told that still wait for layers."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def run(
    model: str,
    words: Sequence[str],
    environ: MutableMapping[str, str],
    changed: Callable[[Bank], None],
) -> Bank:
    """Load the experts of the server that `vllm serve WORDS` would be, and hold them.

    Returns the last status when the process gets a signal that ends it (`SIGNALS`). `changed` is
    called with each status. Raises LvllmError if loading fails, or for a wrong socket of systemd.
    """

    def tell(status: Bank) -> None:
        notify(f"STATUS={status.state}: {status.layers} layers, {status.bytes >> 20} MiB")
        changed(status)

    holder = Holder(model, tell, inherited(environ))
    try:
        with _signals() as came:
            _hold(holder, words, environ, came)
        notify("STOPPING=1")
        holder.fail(STOPPED)
        return holder.status
    except LvllmError as error:
        holder.fail(str(error))
        raise
    finally:
        holder.close()


def _hold(holder: Holder, words: Sequence[str], environ: Mapping[str, str], signals: int) -> None:
    """Load the experts and hold them until there is something to read from `signals`."""

    def stopped(seconds: float | None) -> bool:
        return bool(select.select([signals], [], [], seconds)[0])

    with _loader(words, environ, holder.name) as process:
        while process.poll() is None and not stopped(0.1):
            pass
    if stopped(0):
        return
    if process.returncode or holder.status.state != "ready":
        code = f"the loader ended with code {process.returncode}; its output says why"
        raise LvllmError(holder.failure or code)
    notify("READY=1")
    stopped(None)


@contextmanager
def _signals() -> Iterator[int]:
    """A descriptor that can be read once one of `SIGNALS` has come.

    The C function that catches a signal writes to it. A function in Python would run only when the
    main thread goes on, which waits for a lock meanwhile: it does not notice a signal that the
    kernel gave to another thread, and one that comes while it holds the lock of an Event stops it.
    """
    reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    before = signal.set_wakeup_fd(writing)
    for one in SIGNALS:
        signal.signal(one, lambda *_: None)
    try:
        yield reading
    finally:
        signal.set_wakeup_fd(before)
        os.close(reading)
        os.close(writing)


@contextmanager
def _loader(
    words: Sequence[str], environ: Mapping[str, str], bank: str
) -> Iterator[subprocess.Popen[bytes]]:
    """The loader, which ends with the block or with this process, however that ends."""
    environment = dict(environ) | {
        "LVLLM_MOE_NUMA_ENABLED": "1",
        "LVLLM_SHARE_EXPERTS": "1",
        "LVLLM_PREFILL_ENGINE": "0",
        LOADS_FOR: bank,
    }
    environment.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # The progress of loading stays.
    environment.pop("NOTIFY_SOCKET", None)
    reading, writing = os.pipe()
    # -P: a folder called vllm in the working directory is not the package.
    command = [sys.executable, "-P", "-m", "lvllm.bank.loader", *words]
    process = subprocess.Popen(
        [sys.executable, guardian.__file__, str(reading), *command],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=2,  # Standard output is for the states.
        pass_fds=(reading,),
        start_new_session=True,
    )
    os.close(reading)
    try:
        yield process
    finally:
        os.close(writing)  # The guardian ends the loader, and then itself.
        process.wait()
