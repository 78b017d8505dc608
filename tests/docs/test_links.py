"""Every link and every path that the documentation mentions exists."""

import re
from pathlib import Path

import pytest

from tests.docs.pages import BLOCK, PAGES, ROOT, tracked

LINK = re.compile(r"\]\(([^)\s]+)\)")
WEB = re.compile(r"https://[\w.-]+\.[a-z]+(/[\w./%~#?=&+-]*)?|http://(127\.0\.0\.1|localhost)\S*")
CODE = re.compile(r"`([^`\n]+)`")
MADE_BY_BUILD = ("build/", "dist/", "vllm/", ".venv/")
"""Folders that git does not have, as the beginnings of paths."""
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
            assert WEB.fullmatch(link), f"{name} links to {link}"
            continue
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
