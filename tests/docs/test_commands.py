"""The commands in the documentation are ones that exist, with options that exist.

test_running.py runs those that stand in blocks.
"""

import re
from functools import cache

import pytest
from typer.main import get_command

from lvllm.cli.app import app
from lvllm.settings.variables import VARIABLES
from tests.docs.pages import BLOCK, PAGES, ROOT, blocks, commands
from tests.settings.test_example_configs import serve_parser

LVLLM = {name: found for name in PAGES if (found := commands(name, "lvllm"))}
VLLM = {name: found for name in PAGES if (found := commands(name, "vllm"))}
MAKE = {name: found for name in PAGES if (found := commands(name, "make"))}


@cache
def _serve_options() -> set[str]:
    """What `vllm serve` takes."""
    subparsers = next(action for action in serve_parser()._actions if action.dest == "subparser")
    return set(subparsers.choices["serve"]._option_string_actions)


def _options(words: list[str]) -> list[str]:
    return [word.partition("=")[0] for word in words if re.match(r"--?[a-zA-Z]", word)]


@pytest.mark.parametrize("name", LVLLM)
def test_lvllm_takes_each_option(name: str) -> None:
    group = get_command(app)
    for words in LVLLM[name]:
        command = group.get_command(None, words[1])  # type: ignore[attr-defined]
        assert command is not None, f"{name}: {' '.join(words)}"
        rest = words[2:]
        while hasattr(command, "commands") and rest:  # `lvllm bank stop`
            inner = command.get_command(None, rest[0])
            if inner is None:
                break
            command, rest = inner, rest[1:]
        known = {option for each in command.params for option in (*each.opts, *each.secondary_opts)}
        known |= {"--help"}
        if words[1] in ("serve", "run", "bank", "tune"):  # they hand the others to vLLM
            known |= _serve_options()
        for option in _options(rest):
            assert option in known, f"{name}: {' '.join(words)}"


@pytest.mark.parametrize("name", PAGES)
def test_mentioned_commands_take_each_option(name: str) -> None:
    """Commands within sentences, and lines of blocks that say in [brackets] what may be given."""
    text = BLOCK.sub("", (ROOT / name).read_text())
    lines = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]
    lines += [line for block in blocks(name) for line in block.splitlines() if "[" in line]
    for line in lines:
        found = re.match(r"(?:[A-Z_]+=\S+ )*(?:lvllm ([a-z]+)|vllm serve)\b", line)
        if found is None:
            continue
        known = {"--help"}
        if found[1]:
            command = get_command(app).get_command(None, found[1])  # type: ignore[attr-defined]
            assert command is not None, f"{name}: {line}"
            inner = getattr(command, "commands", {}).values()
            for each in (command, *inner):
                known |= {o for one in each.params for o in (*one.opts, *one.secondary_opts)}
        if found[1] in (None, "bank", "bench", "run", "serve", "tune", "webui"):
            known |= _serve_options()
        options = set(re.findall(r"(?<=[ \[])--[a-z][\w-]*", line))
        assert options <= known, f"{name}: {line}"


@pytest.mark.parametrize("name", VLLM)
def test_vllm_serve_takes_each_option(name: str) -> None:
    for words in VLLM[name]:
        if words[1:2] == ["serve"]:
            unknown = set(_options(words)) - _serve_options()
            assert not unknown, f"{name}: {' '.join(words)}"


@pytest.mark.parametrize("name", MAKE)
def test_make_has_each_target(name: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for words in MAKE[name]:
        for target in words[1:]:
            if "=" not in target:
                assert re.search(rf"^{re.escape(target)}:", makefile, re.M), f"{name}: {words}"


def test_commands_are_found() -> None:
    """A page whose blocks nobody recognises would pass every test above."""
    assert ["lvllm", "doctor"] in commands("docs/quickstart.zh.md", "lvllm")
    assert ["make", "demo"] in commands("docs/quickstart.md", "make")
    assert len(LVLLM) > 10
    assert len(VLLM) > 10


OLD = ("docs/migrating.md", "docs/migrating.zh.md")
"""Pages with settings that LvLLM no longer has."""


@pytest.mark.parametrize("name", [name for name in PAGES if name.startswith("docs/")])
def test_settings_exist(name: str) -> None:
    known = {variable.name for variable in VARIABLES}
    text = (ROOT / name).read_text()
    if name in OLD:  # only the right column
        text = "\n".join(line.split(" | ")[-1] for line in text.splitlines() if " | " in line)
    for setting in re.findall(r"`(L(?:VLLM|K)_[A-Z0-9_]*[A-Z0-9])(?:=|`)", text):
        assert setting in known, f"{name}: {setting}"
