"""The PEP 517 build backend: setuptools' own, except that a hook names the build requirements.

The hook checks the Python, the target and the compiler first. With a list in pyproject.toml, pip
would download PyTorch, or fail to find it, before it runs any line of ours.
"""

from typing import Any

from setuptools.build_meta import (
    build_editable,
    build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

from build_tools.engine import find_compiler, find_torch
from build_tools.errors import BuildError
from build_tools.target import ROOT, select_target

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """The lines of requirements/build.txt, without torch if the environment has one.

    Raises BuildError if nothing can be built here.
    """
    select_target()
    find_compiler()
    lines = (ROOT / "requirements" / "build.txt").read_text().splitlines()
    requirements = [line for line in lines if line and not line.startswith("#")]
    return [line for line in requirements if find_torch() is None or not line.startswith("torch")]


get_requires_for_build_editable = get_requires_for_build_wheel


def build_sdist(sdist_directory: str, config_settings: Any = None) -> str:
    """Raises BuildError always: what a build needs is the whole checkout."""
    raise BuildError("LvLLM has no sdist; build a wheel: `make wheel` or `python -m build --wheel`")
