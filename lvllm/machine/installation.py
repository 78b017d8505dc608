"""Which installed distributions have LvLLM and files of vLLM."""

from importlib import metadata

__all__ = ["name_of_lvllm", "owners_of_vllm", "shared_files"]


def name_of_lvllm() -> str:
    """The distribution whose extras are LvLLM's: `lvllm` beside another vLLM, else `vllm`.

    `pip install 'vllm[...]'` beside another vLLM would fetch upstream's over it.
    """
    try:
        return metadata.distribution("lvllm").name
    except metadata.PackageNotFoundError:
        return "vllm"


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
