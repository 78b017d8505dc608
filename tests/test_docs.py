"""Every link and every path that the documentation mentions exists."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
BLOCK = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
MADE_BY_BUILD = ("build/", "dist/", "vllm/", ".venv/")
"""Folders that git does not have, as the beginnings of paths."""


def tracked() -> list[str]:
    """All files of the repository that are in git, or would be if they were added."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    return subprocess.check_output(command, cwd=ROOT, text=True).splitlines()


PAGES = sorted(name for name in tracked() if name.endswith(".md") and (ROOT / name).exists())
TOP = {name.partition("/")[0] for name in tracked() if "/" in name}
"""The folders at the top of the repository."""


def anchors(page: Path) -> set[str]:
    """What a link may name behind `#`, as GitHub makes it from headings."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_every_link_resolves(name: str) -> None:
    page = ROOT / name
    for link in LINK.findall(BLOCK.sub("", page.read_text())):
        if re.match(r"[a-z]+:", link):
            continue  # the web
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name} links to {link}"
        if anchor:
            assert anchor in anchors(target), f"{name} links to {link}"


@pytest.mark.parametrize("name", PAGES)
def test_every_path_exists(name: str) -> None:
    """A path in backticks that begins with a folder of the repository is a file or a folder."""
    for code in CODE.findall(BLOCK.sub("", (ROOT / name).read_text())):
        if code.startswith(MADE_BY_BUILD) or not re.fullmatch(r"[\w.*/-]+", code):
            continue
        if code.partition("/")[0] in TOP and "/" in code:
            assert list(ROOT.glob(code.rstrip("/"))), f"{name} mentions {code}"
