"""The folder that an export reads and the folder that it writes."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lvllm.checkpoint.headers import Checkpoint, CheckpointError
from lvllm.export.tensorfile import ExportError
from lvllm.units import gib

__all__ = [
    "check_apart",
    "check_space",
    "is_of_tokenizer",
    "other_files",
    "read_config",
    "read_headers",
    "tokenizer_files",
    "working_in",
]

MARKER = ".lvllm-export.json"
"""A file in an unfinished export that says what is exported, and how."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")

TOKENIZER = (
    *("tokenizer*", "chat_template*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.*", "merges.txt", "*.tiktoken"),
)
"""What a tokenizer's files are called."""


def read_config(model: Path) -> dict[str, Any]:
    """config.json of an unquantised checkpoint. Raises ExportError for anything else."""
    if not model.is_dir():
        fault = "is no GGUF file" if model.exists() else "does not exist"
        raise ExportError(f"{model} {fault}: a GGUF file or the folder of a checkpoint is wanted")
    path = model / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise ExportError(f"{model} is no checkpoint folder: it has no config.json") from None
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{path}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ExportError(f"{path}: is no JSON object")
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key in ("quantization_config", "compression_config"):
            if part.get(key):
                known = isinstance(part[key], dict)
                how = part[key].get("quant_method", "unknown") if known else part[key]
                raise ExportError(
                    f"{path}: quantised already ({key}: {how}); export the checkpoint it was made"
                    " from"
                )
    if (model / "hf_quant_config.json").exists():
        raise ExportError(f"{model}: quantised already (it has hf_quant_config.json)")
    return config


def read_headers(model: Path) -> Checkpoint:
    """The tensors of a folder. Raises ExportError if safetensors files are damaged or missing."""
    if not any(model.glob("*.safetensors")):
        raise ExportError(f"{model} has no *.safetensors; weights in other files are not read")
    try:
        return Checkpoint.open(model)
    except CheckpointError as error:
        raise ExportError(str(error)) from None


def other_files(model: Path) -> list[Path]:
    """Files that are copied as they are: tokenizer, chat template, code and the like.

    Raises ExportError for a link to a file that does not exist.
    """
    found = sorted(
        path
        for path in model.iterdir()
        if not path.is_dir()
        and path.suffix not in WEIGHTS
        and not path.name.endswith(".index.json")
        and path.name not in ("config.json", MARKER)
    )
    for path in found:
        if not path.exists():
            raise ExportError(f"{path} is a link to a file that is not there")
    return [path for path in found if path.is_file()]


def is_of_tokenizer(path: Path) -> bool:
    """Whether a file belongs to a tokenizer, which has the chat template, too."""
    return any(path.match(pattern) for pattern in TOKENIZER)


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of the tokenizer in a folder. Raises ExportError if there is none."""
    found = sorted(filter(is_of_tokenizer, folder.iterdir())) if folder.is_dir() else []
    if not found:
        raise ExportError(f"{folder} has no tokenizer: {', '.join(TOKENIZER)}")
    return found


def check_apart(model: Path, out: Path) -> None:
    """Raises ExportError if `out` lies in `model`."""
    if Path(os.path.realpath(model)) in Path(os.path.realpath(out)).parents:
        raise ExportError(f"{out} lies in {model}: choose a folder outside of it")


@contextmanager
def working_in(out: Path, job: dict[str, Any]) -> Iterator[None]:
    """Begin an export in `out`, or go on with one that was begun there.

    The marker in `out` is removed when the block ends without an error. Raises ExportError if `out`
    holds other files or the unfinished export of another `job`, or if another process is at work
    there.
    """
    if os.path.lexists(out) and not out.is_dir():
        kind = "a file" if out.exists() else "a link to nothing"
        raise ExportError(f"{out} is {kind}, a folder is wanted")
    marker = out / MARKER
    if out.exists() and any(out.iterdir()) and not marker.exists():
        raise ExportError(f"{out} is not empty: nothing in it is overwritten")
    created = [path for path in (out, *out.parents) if not path.exists()]
    out.mkdir(parents=True, exist_ok=True)
    with marker.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ExportError(f"{out}: another process is exporting there") from None
        file.seek(0)
        begun = _parse(file.read())
        if begun is None:
            file.truncate(0)
            file.write(json.dumps(job))
            file.flush()
        else:
            _check_same(out, begun, job)
        try:
            yield
        except ExportError:
            # If nothing was written before the error, `out` is left as it was.
            if all(path == marker for path in out.iterdir()):
                marker.unlink()
                for path in created:
                    path.rmdir()
            raise
        marker.unlink()


def _parse(text: str) -> dict[str, Any] | None:
    """The content of a marker. None if a kill cut it short, before anything else was written."""
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError):
        return None


def _check_same(out: Path, begun: dict[str, Any], job: dict[str, Any]) -> None:
    for name, value in job.items():
        if begun.get(name) == value:
            continue
        if name == "source":
            raise ExportError(
                f"{out} holds an unfinished export of another checkpoint, or of one that has"
                " changed since: delete it, or choose another folder"
            )
        raise ExportError(
            f"{out} holds an unfinished export with {name}={begun.get(name)}, not {value}: finish"
            " it with the same options, or delete it"
        )


def check_space(out: Path, wanted: int) -> None:
    """Raises ExportError if `out` has less than `wanted` bytes free."""
    free = shutil.disk_usage(out).free
    if free < wanted:
        raise ExportError(
            f"{out} has {gib(free)} free, {gib(wanted)} are to be written:"
            " make room, or choose another disk"
        )
