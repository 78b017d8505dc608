"""The steps that LvLLM adds to setuptools' `build`: upstream's tree, and the engine."""

import shutil
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Distribution
from setuptools.command.build import build

from build_tools.engine import build_engine
from build_tools.lay_in import extract, lay_in
from build_tools.target import ROOT, select_target
from build_tools.upstream import fetch, pin_of


class PlatformDistribution(Distribution):
    """A distribution for one platform.

    setuptools would not know, because the shared objects are not its own extensions.
    """

    def has_ext_modules(self) -> bool:
        """True: the wheel gets a platform tag and is installed into platlib."""
        return True


class Build(build):
    """`build` into an empty build_lib, so that no file of an earlier build gets into a wheel."""

    sub_commands: ClassVar = [
        *build.sub_commands,
        ("build_upstream", None),
        ("build_engine", None),
    ]

    def run(self) -> None:
        """Run all steps."""
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()
        # The modes of a checkout's files depend on the umask under which git wrote them.
        for path in Path(self.build_lib).rglob("*"):
            path.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)


class _Step(Command):
    """A step of `build`. Setuptools sets `editable_mode` for editable installs."""

    user_options: ClassVar[list[tuple[str, str, str]]] = []

    def initialize_options(self) -> None:
        self.build_lib = ""
        self.editable_mode = False

    def finalize_options(self) -> None:
        self.build_lib = self.get_finalized_command("build").build_lib

    def get_source_files(self) -> list[str]:
        return []

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class BuildUpstream(_Step):
    """Lay upstream's vllm/ into the checkout for an editable install, else into build_lib."""

    def run(self) -> None:
        """Raises BuildError if the tree cannot be laid in."""
        target = select_target()
        if target == "empty":
            return
        wheel = fetch(pin_of(target))
        if self.editable_mode:
            lay_in(wheel)
            return
        # What build_py took from the checkout's vllm/ may be of another target.
        tree = Path(self.build_lib, "vllm")
        shutil.rmtree(tree, ignore_errors=True)
        extract(wheel, tree)


class BuildEngine(_Step):
    """Build lvllm/engine/_engine.so: in the checkout for an editable install, else in build_lib."""

    def run(self) -> None:
        """Raises BuildError if the engine does not build."""
        build_engine(ROOT if self.editable_mode else Path(self.build_lib))
