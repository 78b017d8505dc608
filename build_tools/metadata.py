"""What the distribution declares: upstream's metadata, read from its wheel, and LvLLM's own.

`python -m build_tools.metadata` prints the requirements of a checkout's environment, for pip's
`-r`.
"""

import configparser
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import Any

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from build_tools.target import ROOT, select_target
from build_tools.upstream import fetch, pin_of

REQUIREMENTS = ROOT / "requirements"

# Text models need none of these. The package index has CUDA builds of them, which break
# `transformers` beside a CPU-only PyTorch.
MULTIMODAL = ("torchvision", "torchaudio", "torchcodec")
TORCH = ("torch", *MULTIMODAL)

ENTRY_POINTS = {
    "console_scripts": ["lvllm = lvllm.cli:main"],
    "vllm.general_plugins": ["lvllm = lvllm.plugin:register"],
}


@dataclass
class Declared:
    """Requirements, extras and entry points in the form that setuptools takes."""

    requires: list[str]
    extras: dict[str, list[str]]
    entry_points: dict[str, list[str]]


def read_requirements(name: str) -> list[str]:
    """The requirements in a file of requirements/, without comments."""
    lines = (line.split("#")[0].strip() for line in (REQUIREMENTS / name).read_text().splitlines())
    return [line for line in lines if line]


def torch_is_pinned() -> bool:
    """False once use_existing_torch.py has taken torch out of the build requirements."""
    return any(Requirement(line).name == "torch" for line in read_requirements("build.txt"))


def declare(target: str) -> Declared:
    """Everything that the distribution of `target` declares."""
    if target == "empty":
        return Declared(read_requirements("lvllm.txt"), own_extras(), ENTRY_POINTS)
    metadata, entry_points = read_wheel(fetch(pin_of(target)))
    declared = translate(metadata, entry_points, pin_torch=torch_is_pinned())
    declared.requires += read_requirements("lvllm.txt")
    declared.extras |= own_extras()
    for group, entries in ENTRY_POINTS.items():
        declared.entry_points.setdefault(group, []).extend(entries)
    return declared


def own_extras() -> dict[str, list[str]]:
    """The extras that LvLLM adds to upstream's."""
    return {name: read_requirements(f"{name}.txt") for name in ("ray", "webui")}


def read_wheel(wheel: Path) -> tuple[Message, str]:
    """The METADATA and the entry_points.txt of a wheel."""
    with zipfile.ZipFile(wheel) as archive:

        def read(name: str) -> str:
            (path,) = (n for n in archive.namelist() if n.endswith(f".dist-info/{name}"))
            return archive.read(path).decode()

        return Parser().parsestr(read("METADATA")), read("entry_points.txt")


def translate(metadata: Message, entry_points: str, pin_torch: bool = True) -> Declared:
    """Turn a wheel's METADATA and entry_points.txt into what setuptools takes.

    Requirements in MULTIMODAL move to the extra `multimodal`, together with xformers. With
    `pin_torch` False, torch and its companions are required in any version.
    """
    requires: list[str] = []
    extras: dict[str, list[str]] = {name: [] for name in metadata.get_all("Provides-Extra", [])}
    extras["multimodal"] = ["xformers"]
    for line in metadata.get_all("Requires-Dist", []):
        for extra, requirement in by_extra(line, extras).items():
            if not pin_torch and requirement.name in TORCH:
                requirement.specifier = SpecifierSet()
            if extra is None and requirement.name in MULTIMODAL:
                extra = "multimodal"
            (requires if extra is None else extras[extra]).append(str(requirement))
    parser = configparser.ConfigParser(delimiters="=")
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(entry_points)
    groups = {
        group: [f"{name} = {value}" for name, value in parser[group].items()]
        for group in parser.sections()
    }
    return Declared(requires, extras, groups)


def by_extra(line: str, extras: Iterable[str]) -> dict[str | None, Requirement]:
    """What `line` requires without any extra (None), and what it adds with each of `extras`.

    The markers of the result no longer speak of extras: setuptools adds that itself.
    """
    found: dict[str | None, Requirement] = {}
    for extra in (None, *extras):
        requirement = Requirement(line)
        rest = _with_extra(requirement.marker._markers, extra) if requirement.marker else True
        if rest is False:
            continue
        requirement.marker = Marker(rest) if isinstance(rest, str) else None
        if requirement != found.get(None):
            found[extra] = requirement
    return found


def _with_extra(marker: Any, extra: str | None) -> str | bool:
    """What is left of a marker, as `packaging` parses it, once the extra is known.

    A marker is a comparison, or a list of markers with "and" and "or" between them.
    """
    if isinstance(marker, tuple):
        left, comparison, right = (part.serialize() for part in marker)
        if "extra" not in (left, right):
            return f"{left} {comparison} {right}"
        name = (right if left == "extra" else left).strip("\"'")
        same = extra is not None and canonicalize_name(name) == canonicalize_name(extra)
        return same if comparison == "==" else not same
    alternatives: list[list[str | bool]] = [[]]  # "and" binds tighter than "or".
    for part in marker:
        if part == "or":
            alternatives.append([])
        elif part != "and":
            alternatives[-1].append(_with_extra(part, extra))
    possible = [terms for terms in alternatives if False not in terms]
    rests = [" and ".join(term for term in terms if isinstance(term, str)) for terms in possible]
    if "" in rests:
        return True
    return f"({' or '.join(rests)})" if rests else False


def installation(target: str) -> list[str]:
    """Everything that a checkout's environment needs, to build and to run.

    torch is left out of the build's part, because upstream's requirements ask for the more exact
    version, such as `+cpu`.
    """
    build = [line for line in read_requirements("build.txt") if Requirement(line).name != "torch"]
    return build + declare(target).requires


if __name__ == "__main__":
    print("\n".join(installation(select_target())))
