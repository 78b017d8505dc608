"""What MkDocs does not do by itself for the documentation site (mkdocs.yml).

The site's navigation comes from the tables of docs/README.md, so that GitHub and the site have one
list of pages. A few pages are files outside docs/. All links are written as GitHub wants them.
"""

import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
OUTSIDE = {
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "configurations.md": "examples/configs/README.md",
}
"""Pages of the site, and the files of the repository that they are."""
PAGE_OF = {file: page for page, file in OUTSIDE.items()}

LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<path>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")
BLOCK = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"^```.*?^```$|`[^`\n]+`", re.DOTALL | re.MULTILINE)
HEADING = re.compile(r"^##+ (.*)$", re.MULTILINE)
SECTION = re.compile(r"^(?:\*\*(?P<title>.+)\*\*$|\| \[[^\]]*\]\((?P<link>[^)#]+)\))", re.MULTILINE)
"""The title of a table, or a row that begins with a link."""


@event_priority(100)
def on_config(config: MkDocsConfig) -> None:
    """Make the navigation."""
    config.nav = ["README.md", *_entries("README.md")]


def _entries(index: str) -> list[Any]:
    """What the tables of the page `index` list, below their titles."""
    found: list[Any] = []
    here = found
    for match in SECTION.finditer((ROOT / "docs" / index).read_text()):
        if title := match["title"]:
            here = []
            found.append({title: here})
            continue
        page = _page(f"docs/{index}", match["link"])
        if page is None:
            continue
        name = posixpath.basename(page)
        here.append({_title(page): [page, *_entries(page)]} if name == "README.md" else page)
    return [entry for entry in found if not isinstance(entry, dict) or any(entry.values())]


def _title(page: str, translated: bool = False) -> str:
    file = ROOT / OUTSIDE.get(page, f"docs/{page}")
    twin = file.with_suffix(".zh.md")
    text = (twin if translated and twin.exists() else file).read_text()
    return text.partition("\n")[0].removeprefix("# ")


def _page(source: str, link: str) -> str | None:
    """The page of the site to which `link` in the repository's file `source` leads, if any."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    if target in PAGE_OF:
        return PAGE_OF[target]
    if not target.startswith("docs/"):
        return None
    return target.removeprefix("docs/").replace(".zh.md", ".md")


@event_priority(100)
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are outside docs/."""
    for page in OUTSIDE:
        files.append(File(page, config.docs_dir, config.site_dir, config.use_directory_urls))
    return files


def on_page_read_source(page: Page, config: MkDocsConfig) -> str | None:
    """Read the pages that are outside docs/."""
    file = OUTSIDE.get(page.file.src_uri)
    return (ROOT / file).read_text() if file else None


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links between files of the repository lead to pages; others become plain text.

    Links that are named after a page's file are named after its title instead.
    """
    source = OUTSIDE.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    folder = posixpath.dirname(page.file.src_uri) or "."

    def lead(match: re.Match[str]) -> str:
        if re.match(r"[a-z]+:", match["path"]):
            return match[0]
        target = _page(source, match["path"])
        if target is None:
            return match["text"]
        text = _title(target, ".zh." in source) if match["text"].endswith(".md") else match["text"]
        return f"[{text}]({posixpath.relpath(target, folder)}{match['anchor'] or ''})"

    text = _outside_code(lambda part: LINK.sub(lead, part), markdown)
    return text if ".zh." not in source else _with_english_anchors(text, source, config)


def _outside_code(change: Callable[[str], str], markdown: str) -> str:
    parts, end = [], 0
    for code in CODE.finditer(markdown):
        parts += [change(markdown[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, change(markdown[end:])])


def _with_english_anchors(markdown: str, source: str, config: MkDocsConfig) -> str:
    """A translation whose headings, but for the title, also have the English page's anchors.

    Pages without a translation link to them.
    """
    english = BLOCK.sub("", (ROOT / source.replace(".zh.md", ".md")).read_text())
    slugify = config.mdx_configs["toc"]["slugify"]
    anchors = [slugify(heading.replace("`", ""), "-") for heading in HEADING.findall(english)]
    blocks = BLOCK.split(markdown)
    found = iter(anchors)
    blocks = [
        HEADING.sub(lambda match: f'<a id="{next(found)}"></a>\n\n{match[0]}', part)
        if not part.startswith("```")
        else part
        for part in blocks
    ]
    return "".join(blocks)
