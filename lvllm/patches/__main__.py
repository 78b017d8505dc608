"""Prints docs/patches.md: `python -m lvllm.patches`."""

import re
import sys
from itertools import groupby

from lvllm.patches import patches
from lvllm.patches.registry import Patch


def markdown() -> str:
    """Return the page: a section for each module of `lvllm.patches`, and its targets."""
    lines = [
        "# What LvLLM replaces",
        "",
        "This file is generated from `lvllm/patches/` with `make docs`. `lvllm env --patches`"
        " prints the",
        "same list as a table.",
        "",
        "With `LVLLM_MOE_NUMA_ENABLED=1` LvLLM replaces or adds the following attributes of vLLM,",
        "transformers and Python in each of vLLM's processes, and nothing else. With the switch",
        "off it touches nothing. Each target must have the signature that the replacement was",
        "written against. Otherwise the start ends with one line that names the target, so a new",
        "vLLM is never patched blindly.",
    ]
    for module, group in groupby(patches(), key=lambda patch: patch.make.__module__):
        lines += ["", f"## `{module}`", "", _first_line(module)]
        # Targets that differ in nothing else share a section.
        for body, alike in groupby(group, key=_body):
            lines.append("")
            lines += [f"### `{patch.target}`" for patch in alike]
            lines += body
    return "\n".join(lines) + "\n"


def _first_line(module: str) -> str:
    return (sys.modules[module].__doc__ or "").partition("\n")[0]


def _linked(text: str) -> str:
    """Return the text with links where it names addresses and drafts."""
    text = re.sub(r"https://[^\s;,]+", r"<\g<0>>", text)
    return re.sub(r"docs/(upstream/\S+\.md)", r"[\1](\1)", text)


def _body(patch: Patch) -> list[str]:
    where = f"{patch.platform.upper()} only" if patch.platform else "every platform"
    releases = f"{patch.package} {', '.join(patch.checked)}"
    lines = [
        "",
        patch.why,
        "",
        f"- Installed: {patch.when}, on {where}.",
        f"- Upstream: {_linked(patch.upstream)}.",
        f"- Can go when: {patch.until}.",
        f"- Looked up in: {releases}.",
    ]
    if patch.unless is not None:
        lines.append(f"- Not replaced where: {patch.unless.text}.")
    return lines


if __name__ == "__main__":
    print(markdown(), end="")
