"""Keeps API keys out of the arguments of processes, which every user of the host can read."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["VARIABLE", "hide", "split"]

VARIABLE = "VLLM_API_KEY"
"""vLLM's environment variable for one key. /proc/PID/environ is for the process's user alone."""
_OPTION = re.compile("--api[-_]k(?:ey?)?(?:=(.*))?", re.DOTALL)
"""vLLM's parser takes abbreviations, too."""
_HIDDEN = "***"


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words without the option `--api-key`, and the keys that it gives.

    As for vLLM's parser, all words up to the next option are keys.
    """
    others: list[str] = []
    keys: list[str] = []
    are_keys = False
    for word in words:
        if (option := _OPTION.fullmatch(word)) is not None:
            are_keys = option[1] is None
            keys += [] if option[1] is None else [option[1]]
        elif are_keys and not word.startswith("-"):
            keys.append(word)
        else:
            are_keys = False
            others.append(word)
    return others, keys


def hide() -> None:
    """Remove keys from what `ps` shows of this process."""
    if not any(map(_OPTION.fullmatch, sys.argv)):
        return
    import setproctitle

    words = Path("/proc/self/cmdline").read_text(errors="replace").rstrip("\0").split("\0")
    others, _ = split(words)
    setproctitle.setproctitle(" ".join([*others, "--api-key", _HIDDEN]))
