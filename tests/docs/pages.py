"""The pages of the documentation, and the code in them."""

import re
import shlex
import subprocess
from pathlib import Path
from typing import NamedTuple

__all__ = ["BLOCK", "PAGES", "ROOT", "Command", "blocks", "commands", "shell", "tracked"]

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"(?:(?<=\n\n)|\A)((?: {4}.*\n(?:\n(?= {4}))?)+)")
PROMPTLESS = re.compile(r"[A-Z_]+=\S*")
"""A variable that is set for a command."""
PROGRAMS = [
    "apt",
    "curl",
    "docker",
    "echo",
    "export",
    "kubectl",
    "lvllm",
    "make",
    "pip",
    "python",
    "ray",
    "source",
    "systemctl",
    "vllm",
]
"""The programs of the commands in the documentation."""


class Command(NamedTuple):
    """A command in a block, on one line, and the comment behind it."""

    line: str
    comment: str


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


def shell(block: str) -> list[Command] | None:
    """The commands of a block; None if its first word is no program.

    Lines that describe what may be given, with [brackets], are no commands.
    """
    found: list[Command] = []
    for line in block.replace("\\\n", " ").splitlines():
        command, _, comment = line.partition(" #")
        command = re.sub(r" {2,}", " ", command.strip())
        words = [word for word in command.split() if not PROMPTLESS.fullmatch(word)]
        if not words:
            continue
        if not found and words[0].rpartition("/")[2] not in PROGRAMS:
            return None
        found.append(Command(command, comment.strip()))
    return [each for each in found if not re.search(r" \[(?!\{)|\w\|\w", each.line)]
