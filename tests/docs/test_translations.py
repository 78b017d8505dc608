"""A page in Chinese has the parts of the English page that it translates."""

import re

import pytest

from tests.docs.pages import BLOCK, PAGES, ROOT, blocks, shell
from tests.docs.test_links import LINK

TRANSLATED = [name for name in PAGES if name.endswith(".zh.md") and name != "docs/README.zh.md"]
"""The page that lists the pages lists fewer of them in Chinese."""


def _shape(name: str) -> dict[str, object]:
    text = BLOCK.sub("", (ROOT / name).read_text())
    return {
        "headings": [len(marks) for marks in re.findall(r"^(#+) ", text, re.MULTILINE)],
        "rows of tables": len(re.findall(r"^\|", text, re.MULTILINE)),
        "items of lists": len(re.findall(r"^- ", text, re.MULTILINE)),
        "pictures": [path.replace(".zh.", ".") for path in re.findall(r"!\[[^]]*\]\((.*)\)", text)],
        "links": sorted(_english(link) for link in LINK.findall(text)),
        "code": [_plain(block) for block in blocks(name)],
        "output of programs": re.findall(r"<!-- .*: begin -->.*<!-- .*: end -->", text, re.DOTALL),
    }


def _english(link: str) -> str:
    """The page to which a link leads, without its anchor, which may be in Chinese."""
    return link.partition("#")[0].replace(".zh.", ".")


@pytest.mark.parametrize(
    "name", [name for name in PAGES if name.endswith((".zh.md", "README_cn.md"))]
)
def test_links_lead_to_chinese_pages(name: str) -> None:
    page = ROOT / name
    for link in LINK.findall(BLOCK.sub("", page.read_text())):
        path = link.partition("#")[0]
        twin = (page.parent / path).with_suffix(".zh.md")
        if path.endswith(".md") and twin.exists() and twin != page:
            assert path.endswith(".zh.md"), f"{name}: {link}"


def _plain(block: str) -> list[str]:
    """The lines of a block without comments and what users say, which are translated."""
    said = re.compile(r'\s+#.*|(?<="content": ").*?(?=")')
    return [said.sub("", line).rstrip() for line in block.splitlines()]


@pytest.mark.parametrize("name", TRANSLATED)
def test_parts(name: str) -> None:
    chinese, english = _shape(name), _shape(name.replace(".zh.md", ".md"))
    for part, found in chinese.items():
        assert found == english[part], f"{name}: {part}"


def test_the_readmes_have_the_same_commands() -> None:
    english, chinese = (
        ["\n".join(_plain(block)) for block in blocks(name) if shell(block) is not None]
        for name in ("README.md", "README_cn.md")
    )
    assert english == chinese


def test_there_are_translations() -> None:
    assert "docs/quickstart.zh.md" in TRANSLATED
    assert len(_shape("docs/quickstart.zh.md")["code"]) == 6  # type: ignore[arg-type]
