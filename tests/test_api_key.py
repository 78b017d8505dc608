"""Where API keys stand in arguments, and what `ps` shows of them."""

import subprocess
import sys
from pathlib import Path

import pytest

from lvllm.api_key import split

SHOW = """
import sys
from pathlib import Path
from lvllm import api_key
api_key.hide()
print(Path("/proc/self/cmdline").read_bytes())
"""


@pytest.mark.parametrize(
    ("words", "others", "keys"),
    [
        (["m", "--api-key", "one", "--port", "81"], ["m", "--port", "81"], ["one"]),
        (["m", "--api_key=one"], ["m"], ["one"]),
        (["--api-k", "one", "two", "-tp", "2"], ["-tp", "2"], ["one", "two"]),
        (["m", "--api-key=one", "--api-key", "two"], ["m"], ["one", "two"]),
        (["m", "--api-server-count", "2"], ["m", "--api-server-count", "2"], []),
        ([], [], []),
    ],
)
def test_keys_are_found_as_vllm_finds_them(
    words: list[str], others: list[str], keys: list[str]
) -> None:
    assert split(words) == (others, keys)


def test_other_processes_do_not_see_the_key(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(SHOW)
    command = [sys.executable, str(program), "serve", "--api-key", "sesame", "--port", "81"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "sesame" not in shown
    assert f"{program} serve --port 81 --api-key ***" in shown
