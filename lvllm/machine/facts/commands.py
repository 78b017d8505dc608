"""Ask other programs about the machine."""

import subprocess
from collections.abc import Callable, Sequence
from typing import TypeAlias

__all__ = ["Run", "run"]

SECONDS = 20
"""nvidia-smi takes some seconds where no process keeps the driver loaded."""

Run: TypeAlias = Callable[[Sequence[str]], str | None]
"""Returns what a program prints; None if it is not installed, hangs, or does not run."""


def run(command: Sequence[str]) -> str | None:
    """What the program prints, without blanks around it.

    A program that fails may have printed its answer: systemd-detect-virt exits with 1 for "none".
    """
    try:
        result = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=SECONDS,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.decode(errors="replace").strip()
