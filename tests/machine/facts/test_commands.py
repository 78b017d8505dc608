"""Asking other programs."""

import sys

import pytest

from lvllm.machine.facts import commands


def test_what_a_program_prints() -> None:
    assert commands.run([sys.executable, "-c", "print(' x ')"]) == "x"


def test_a_program_that_fails_may_have_answered() -> None:
    assert commands.run([sys.executable, "-c", "print('none'); raise SystemExit(1)"]) == "none"


def test_a_missing_program() -> None:
    assert commands.run(["no-such-program"]) is None


def test_a_program_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "SECONDS", 0.2)
    assert commands.run([sys.executable, "-c", "import time; time.sleep(60)"]) is None
