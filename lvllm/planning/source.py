"""Finds what describes a model: its config.json, in a folder or on a hub, or a GGUF file."""

from pathlib import Path

from lvllm.checkpoint.gguf_headers import first_of_part, is_gguf
from lvllm.hub.repository import HubError, fetch, source_by_environment
from lvllm.planning.errors import PlanError

__all__ = ["folder_of", "gguf_of"]

UNSERVED = "LvLLM does not serve GGUF files yet"


def folder_of(model: str) -> Path:
    """The folder with the config.json of `model`, as `vllm serve` takes it.

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
        if _models(folder):
            raise PlanError(f"{model}: the folder has GGUF files and no config.json; {UNSERVED}")
        raise PlanError(f"{model}: the folder has no config.json")
    if folder.exists():
        what = f"a GGUF file, and {UNSERVED}" if is_gguf(folder) else "a file"
        raise PlanError(
            f"{model}: {what}; a folder with config.json, or an id on the hub is wanted"
        )
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise PlanError(f"{model}: no such folder, and no id on the hub, which is OWNER/NAME")
    try:
        return fetch(model, source_by_environment(), ["config.json"])
    except HubError as error:
        raise PlanError(f"no folder is called so, and {error}") from None


def gguf_of(model: str) -> Path | None:
    """The GGUF file that `model` names, or the one in that folder if it has no config.json.

    Of a model in several files, it is the one that is named, or the first one of the folder.
    The result is None if `model` is something else.

    Raises:
        PlanError: if there is no such file, or if the folder has several models.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if (path / "config.json").is_file():
            return None
        models = _models(path)
        if len(models) > 1:
            names = ", ".join(file.name for file in models[:4]) + ", ..." * (len(models) > 4)
            raise PlanError(f"{model}: the folder has {len(models)} models; name one: {names}")
        return models[0] if models else None
    if path.is_file():
        return path if is_gguf(path) else None
    if path.suffix == ".gguf":
        raise PlanError(f"{model}: no such file")
    return None


def _models(folder: Path) -> list[Path]:
    """The GGUF files of a folder: one for each model, without encoders of pictures."""
    files = [path for path in folder.glob("*.gguf") if not path.name.startswith("mmproj")]
    return sorted({first_of_part(path) for path in files})
