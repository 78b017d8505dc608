"""Finds the GGUF file that somebody means by a file, a part of a model, or a folder."""

from pathlib import Path

from lvllm.checkpoint.gguf_headers import first_of_part, is_gguf
from lvllm.checkpoint.headers import CheckpointError

__all__ = ["gguf_of", "models_in"]

OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.pt")


def gguf_of(model: str) -> Path | None:
    """The GGUF file that `model` names, or that the folder `model` has and no other weights.

    Of a model in several files, it is the one that is named, or the first one of the folder.
    The result is None if `model` is something else, such as an id on a hub.

    Raises:
        CheckpointError: if there is no such file, or if the folder has several models.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if any(True for pattern in OTHER_WEIGHTS for _ in path.glob(pattern)):
            return None
        models = models_in(path)
        if len(models) > 1:
            names = ", ".join(file.name for file in models[:4]) + ", ..." * (len(models) > 4)
            raise CheckpointError(
                f"{model}: the folder has {len(models)} models; name one: {names}"
            )
        return models[0] if models else None
    if path.is_file():
        return path if is_gguf(path) else None
    if path.suffix == ".gguf":
        raise CheckpointError(f"{model}: no such file")
    return None


def models_in(folder: Path) -> list[Path]:
    """The GGUF files of a folder: one for each model, without encoders of pictures."""
    files = [path for path in folder.glob("*.gguf") if not path.name.startswith("mmproj")]
    return sorted({first_of_part(path) for path in files})
