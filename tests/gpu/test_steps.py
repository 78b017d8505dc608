"""Tests the script for a machine with a GPU, as far as it runs without one."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.gpu.on_device import step
from tests.gpu.on_device.step import Command


def test_commands_pass_fail_and_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = (
        Command("good one", 60, "echo first; echo last", shown=1),
        Command("bad", 60, "echo wrong; exit 3"),
        Command("slow", 1, "echo begun; sleep 100 & sleep 100"),
        Command("missing", 60, "false", wants="no-such-program"),
    )
    monkeypatch.setitem(step.STEPS, 1, commands)
    monkeypatch.setattr(sys, "argv", ["step", "1", str(tmp_path / "out")])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        step.main()
    assert ended.value.code
    said = capsys.readouterr().out
    assert "passed    good one (" in said
    assert "bad (0 s), status 3:\nwrong\n" in said
    assert "status -1:\nbegun\n\nnot done after 1 s\n" in said
    assert "left out  missing: there is no no-such-program\n" in said
    assert said.endswith("\ngood one\nlast\n\nstep 1, failed: bad, slow\n")
    names = sorted(file.name for file in (tmp_path / "out" / "step-1").iterdir())
    assert names == ["bad.log", "good-one.log", "slow.log"]


def test_commands_run_beside_each_other(tmp_path: Path) -> None:
    """Two that wait for each other end, and the third finds both ended."""

    def waiting(own: str, other: str) -> str:
        return f"touch {own}; until [ -e {other} ]; do sleep 0.01; done"

    a, b = tmp_path / "a", tmp_path / "b"
    commands = (
        Command("one", 60, waiting(str(a), str(b))),
        Command("two", 60, waiting(str(b), str(a)), beside=True),
        Command("three", 60, f"[ -e {a} -a -e {b} ]"),
    )
    assert step.run_all(commands, tmp_path) == {"one": True, "two": True, "three": True}


def test_a_log_has_its_lines_at_once(tmp_path: Path) -> None:
    """What has been measured is known even if the rest does not end."""
    log, seen = tmp_path / "slow.log", tmp_path / "seen"
    script = (
        "import os, time\n"
        "print('measured')\n"
        f"while not os.path.exists({str(seen)!r}): time.sleep(0.01)\n"
    )
    slow = Command("slow", 120, f'exec {sys.executable} -c "{script}"')
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(step.run, slow, tmp_path)
        while not (log.exists() and log.read_text() == "measured\n"):
            assert not running.done(), log.read_text()
            time.sleep(0.01)
        seen.touch()
        assert running.result()


def test_a_step_that_is_not_there() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.on_device.step", "9"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr == "wanted the number of a step, 1 to 5, and a folder for logs\n"
