"""What a start needs beside memory."""

import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from lvllm.errors import LvllmError
from lvllm.machine import room

# A process cannot raise a hard limit that it has lowered, so another process does it.
PROGRAM = """
import resource, sys
from lvllm.machine import room
resource.setrlimit(resource.RLIMIT_NOFILE, (100, int(sys.argv[1])))
room.check_open_files()
print(resource.getrlimit(resource.RLIMIT_NOFILE))
"""


def with_limit(most: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, str(most)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_limit_of_open_files_is_raised_as_far_as_allowed() -> None:
    assert with_limit(room.OPEN_FILES).stdout == "(256, 256)\n"
    assert "LvllmError: a process may have 255 open files" in with_limit(255).stderr


def test_no_limit_of_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "allow_many_files", lambda: resource.RLIM_INFINITY)
    room.check_open_files()


def test_room_in_shared_memory(tmp_path: Path) -> None:
    folder = str(tmp_path)
    room.check_shared_memory(1, folder)
    with pytest.raises(LvllmError, match=re.escape(folder) + r" has \d+ MiB free, and vLLM's"):
        room.check_shared_memory(1 << 60, folder)
    room.check_shared_memory(1 << 60, f"{folder}/nothing")
