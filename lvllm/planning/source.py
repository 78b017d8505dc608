"""Finds what describes a model: its config.json, in a folder or on a hub, or a GGUF file."""

from pathlib import Path

from lvllm.checkpoint.gguf import finding
from lvllm.checkpoint.headers import CheckpointError
from lvllm.hub.repository import HubError, fetch, source_by_environment
from lvllm.planning.errors import PlanError

__all__ = ["folder_of", "gguf_of"]


def folder_of(model: str) -> Path:
    """The folder with the config.json of `model`, which is no GGUF file.

    A folder of that name is taken; otherwise `model` is the id of a repository, and its config.json
    is downloaded, or taken from the cache. VLLM_USE_MODELSCOPE=True asks ModelScope instead of the
    Hugging Face hub, as in vLLM.

    Raises:
        PlanError: if there is no such model, or if the hub does not answer.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if (folder / "config.json").is_file():
            return folder
        raise PlanError(f"{model}: the folder has no config.json")
    if folder.exists():
        raise PlanError(
            f"{model}: a file; a folder with config.json, a GGUF file or an id on the hub is wanted"
        )
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise PlanError(f"{model}: no such folder, and no id on the hub, which is OWNER/NAME")
    try:
        return fetch(model, source_by_environment(), ["config.json"])
    except HubError as error:
        raise PlanError(f"no folder is called so, and {error}") from None


def gguf_of(model: str) -> Path | None:
    """The GGUF file that `model` names, as `vllm serve` takes it; None if it names something else.

    Raises:
        PlanError: if there is no such file, or if the folder has several models.
    """
    try:
        return finding.gguf_of(model)
    except CheckpointError as error:
        raise PlanError(str(error)) from None
