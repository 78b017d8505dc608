"""Which installed distributions have files of vLLM."""

from importlib import metadata

__all__ = ["owners_of_vllm", "shared_files"]


def owners_of_vllm() -> list[str]:
    """The names of all distributions with a package `vllm`, as their metadata says."""
    return sorted(
        {
            distribution.name
            for distribution in metadata.distributions()
            if "vllm" in (distribution.read_text("top_level.txt") or "").split()
        }
    )


def shared_files(owners: list[str]) -> str | None:
    """A line about several `owners` of the same files; None if there is one at most.

    pip installs one over the other, and deletes the files of both with either, while `pip check`
    still passes.
    """
    if len(owners) < 2:
        return None
    return (
        f"the distributions {' and '.join(owners)} have the same files in vllm/, and uninstalling"
        f" one deletes the other's: `pip uninstall {' '.join(owners)}`, and install LvLLM again"
    )
