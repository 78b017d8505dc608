"""The messages that the troubleshooting pages quote are in the code."""

import ast
import os
import re
from errno import EADDRINUSE
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.docs.pages import BLOCK, ROOT

PAGES = ("docs/troubleshooting.md", "docs/troubleshooting.zh.md")
QUOTED = re.compile(r"\*\*`([^`]+)`\*\*")
HOLE = "\0"
"""What a program fills in; on the pages it is `...`."""


def _texts(source: str) -> list[str]:
    """All texts of a Python module as they are printed."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else HOLE for part in node.values]
            found.append("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(re.sub(r"%[sd.\df]+|\{\}", HOLE, node.value))
    return found


@cache
def said() -> list[str]:
    """What LvLLM, its build, pip and the named parts of vLLM may print. C++ files are texts."""
    vllm, pip = (Path(str(find_spec(name).origin)).parent for name in ("vllm", "pip"))  # type: ignore[union-attr]
    files = [*(ROOT / "lvllm").rglob("*.py"), *(ROOT / "build_tools").glob("*.py")]
    files += [vllm / "v1/worker/cpu_worker.py", vllm / "renderers/params.py"]
    files += [vllm / "entrypoints/serve/middleware/authenticate.py"]
    files += [pip / "_internal/resolution/resolvelib/factory.py"]
    python = [text for file in files for text in _texts(file.read_text())]
    engine = [file.read_text() for file in (ROOT / "csrc/lk").glob("*.cpp")]
    return [*python, *engine, os.strerror(EADDRINUSE)]


def expression(quoted: str) -> re.Pattern[str]:
    """What a text has to contain; values of `...` may be written out on the page."""
    parts = [re.escape(part.strip()) for part in quoted.split("...") if part.strip(" :?")]
    return re.compile(r"[^\n]*?".join(parts))


@pytest.mark.parametrize("name", PAGES)
def test_messages_exist(name: str) -> None:
    page = BLOCK.sub("", (ROOT / name).read_text())
    quoted = QUOTED.findall(page)
    assert len(quoted) > 30
    for message in quoted:
        message = re.sub(r"torch==\S+|`", "...", message)
        pattern = expression(message)
        assert any(pattern.search(text) for text in said()), f"{name}: {message}"


def test_lines_of_the_log_exist() -> None:
    page = (ROOT / PAGES[0]).read_text()
    for line in re.findall(r"^    LvLLM: (.*)$", page, re.MULTILINE):
        assert any(
            text.startswith("LvLLM: ")
            and re.match(".*?".join(map(re.escape, text.removeprefix("LvLLM: ").split(HOLE))), line)
            for text in said()
            if HOLE in text
        ), line


def test_both_pages_quote_the_same() -> None:
    english, chinese = (QUOTED.findall((ROOT / name).read_text()) for name in PAGES)
    assert english == chinese
