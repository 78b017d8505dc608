"""A page in Chinese has the parts of the English page that it translates."""

import re

import pytest

from tests.docs.pages import BLOCK, PAGES, ROOT, blocks

TRANSLATED = [name for name in PAGES if name.endswith(".zh.md") and name != "docs/README.zh.md"]
"""The page that lists the pages lists fewer of them in Chinese."""


def _shape(name: str) -> dict[str, object]:
    text = BLOCK.sub("", (ROOT / name).read_text())
    return {
        "headings": [len(marks) for marks in re.findall(r"^(#+) ", text, re.MULTILINE)],
        "rows of tables": len(re.findall(r"^\|", text, re.MULTILINE)),
        "items of lists": len(re.findall(r"^- ", text, re.MULTILINE)),
        "pictures": [path.replace(".zh.", ".") for path in re.findall(r"!\[[^]]*\]\((.*)\)", text)],
        "code": [_plain(block) for block in blocks(name)],
    }


def _plain(block: str) -> list[str]:
    """The lines of a block without comments and what users say, which are translated."""
    said = re.compile(r'\s+#.*|(?<="content": ").*?(?=")')
    return [said.sub("", line).rstrip() for line in block.splitlines()]


@pytest.mark.parametrize("name", TRANSLATED)
def test_parts(name: str) -> None:
    chinese, english = _shape(name), _shape(name.replace(".zh.md", ".md"))
    for part, found in chinese.items():
        assert found == english[part], f"{name}: {part}"


def test_there_are_translations() -> None:
    assert "docs/quickstart.zh.md" in TRANSLATED
    assert len(_shape("docs/quickstart.zh.md")["code"]) == 6  # type: ignore[arg-type]
