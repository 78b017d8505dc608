"""A command in a terminal, as a user has it."""

import contextlib
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.chat.fake_server import WAIT

# The terminal must be the controlling one of a new session, or Ctrl-C would not reach the command.
COMMAND = "import os; os.login_tty(0); from lvllm.cli import main; main()"
INVISIBLE = re.compile(r"\r|\x1b\[\?2004[hl]")
"""Carriage returns, and what switches the pasting of several lines on and off."""


class Terminal:
    """`lvllm ARGUMENTS` in a pseudo-terminal, without some variables of the environment."""

    def __init__(self, *arguments: str, without: Sequence[str] = (), **environment: str) -> None:
        self._end, terminal = pty.openpty()
        environ = {name: value for name, value in os.environ.items() if name not in without}
        self.process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, *arguments],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            env=environ | {"TERM": "xterm"} | environment,
        )
        os.close(terminal)

    def type(self, text: str) -> None:
        os.write(self._end, text.encode())

    def read_until(self, text: str) -> str:
        """What is printed up to and including `text`, without carriage returns and such."""
        printed = b""
        deadline = time.monotonic() + WAIT
        while text not in (shown := INVISIBLE.sub("", printed.decode(errors="replace"))):
            ready, _, _ = select.select([self._end], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{text!r} does not come after {shown!r}"
            try:
                printed += os.read(self._end, 1)
            except OSError:  # The command has ended.
                raise AssertionError(f"{text!r} never came after {shown!r}") from None
        return shown

    def interrupt(self) -> None:
        """Press Ctrl-C once the command waits.

        CPython's input() loses the key in the moment between its prompt and its wait for input.
        """
        status = Path(f"/proc/{self.process.pid}/status")
        deadline = time.monotonic() + WAIT
        while "State:\tS (sleeping)" not in status.read_text():
            assert time.monotonic() < deadline, "the command never waits"
            time.sleep(0.01)
        self.type("\x03")

    def exit_code(self) -> int:
        """The exit code of the command, once it has printed all."""
        with contextlib.suppress(OSError):
            while select.select([self._end], [], [], WAIT)[0] and os.read(self._end, 1024):
                pass
        return self.process.wait(WAIT)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._end)
