"""The pages of the documentation, and the code in them."""

import re
import shlex
import subprocess
from pathlib import Path

__all__ = ["BLOCK", "PAGES", "ROOT", "commands", "tracked"]

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"(?:(?<=\n\n)|\A)((?: {4}.*\n(?:\n(?= {4}))?)+)")
PROMPTLESS = re.compile(r"[A-Z_]+=\S*")
"""A variable that is set for a command."""


def tracked() -> list[str]:
    """All files of the repository that are in git, or would be if they were added."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    return subprocess.check_output(command, cwd=ROOT, text=True).splitlines()


PAGES = sorted(name for name in tracked() if name.endswith(".md") and (ROOT / name).exists())


def blocks(name: str) -> list[str]:
    """The blocks of code of a page, in order, without fences and indentation."""
    text = (ROOT / name).read_text()
    fenced = [block.partition("\n")[2].rpartition("\n")[0] for block in BLOCK.findall(text)]
    indented = [
        re.sub(r"^ {4}", "", each, flags=re.M) for each in INDENTED.findall(BLOCK.sub("", text))
    ]
    return fenced + indented


def commands(name: str, *programs: str) -> list[list[str]]:
    """The words of each command of a page's blocks that runs one of `programs`.

    Lines that describe what may be given, with [brackets], are no commands.
    """
    found = []
    for block in blocks(name):
        for line in block.replace("\\\n", " ").splitlines():
            if not any(program in line for program in programs) or "[" in line:
                continue
            try:
                words = shlex.split(line.partition(" | ")[2] or line, comments=True)
            except ValueError:  # a part of a text in quotes that goes on over lines
                continue
            while words and PROMPTLESS.fullmatch(words[0]):
                words = words[1:]
            if words and words[0] in programs:
                found.append(words)
    return found
