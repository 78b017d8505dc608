"""The folder that stands for a GGUF file: vLLM takes it for the model.

It has a config.json, the tokenizer's files, a generation_config.json and links to the file's parts,
and no weights. It is written once for each state of a file, into the user's cache.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lvllm
from lvllm.checkpoint.gguf.architectures import METHOD, architecture_of
from lvllm.checkpoint.gguf.fields import Fields
from lvllm.checkpoint.gguf.finding import gguf_of
from lvllm.checkpoint.gguf.tensors import expert_types, tensors_of
from lvllm.checkpoint.gguf.tokenizer import has_tokenizer, write_tokenizer
from lvllm.checkpoint.gguf_headers import GgufHeader, open_gguf
from lvllm.checkpoint.headers import CheckpointError

__all__ = ["cache", "configuration", "folder_of", "is_presented", "present"]

TOKEN_IDS = ("bos_token_id", "eos_token_id")
WRITTEN = 2
"""A number for what this module writes, to be raised when that changes."""


def cache() -> Path:
    """Where the folders are: $XDG_CACHE_HOME/lvllm/gguf, or ~/.cache/lvllm/gguf."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "lvllm" / "gguf"


def is_presented(folder: Path) -> bool:
    """Whether a folder is one that `present` wrote."""
    return folder.parent == cache()


def folder_of(model: str, *, tokenizer: bool = True) -> Path | None:
    """The folder that stands for the GGUF file which `model` names; None: it names something else.

    Raises CheckpointError as `present` does.
    """
    file = gguf_of(model)
    return None if file is None else present(file, tokenizer=tokenizer)


def present(file: Path, *, tokenizer: bool, config: Mapping[str, Any] | None = None) -> Path:
    """The folder for the model in a GGUF file and, if it is a part, in the others.

    Args:
        file: the file, or one of its parts.
        tokenizer: whether the folder must have the file's tokenizer.
        config: a config.json to take in the place of the file's own description.

    Raises:
        CheckpointError: if the file is damaged, or lacks what is wanted.
    """
    header = open_gguf(file)
    folder = cache() / _name(header, tokenizer, config)
    if folder.is_dir():
        return folder
    written = configuration(header, config)
    if tokenizer and not has_tokenizer(header):
        raise CheckpointError(f"{header.file}: has no tokenizer: --tokenizer DIR gives one")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=folder.parent))
    except OSError as error:
        raise CheckpointError(f"{folder.parent}: {error.strerror}") from None
    try:
        _write(draft / "config.json", written)
        ids = {name: value for name, value in written.items() if name in TOKEN_IDS}
        _write(draft / "generation_config.json", ids)
        if tokenizer:
            longest = int(written.get("max_position_embeddings") or 1 << 20)
            write_tokenizer(open_gguf(file, vocabulary=True), draft, longest)
        for part in header.files:
            suffix = "" if part.suffix == ".gguf" else ".gguf"
            (draft / (part.name + suffix)).symlink_to(part.absolute())
        os.replace(draft, folder)
    except OSError as error:
        if not folder.is_dir():  # Otherwise another process has just written the same.
            raise CheckpointError(f"{folder}: {error.strerror}") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def configuration(header: GgufHeader, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """config.json of a model; `config` replaces what the file says of its architecture.

    The section of the quantisation has ggml's types of each layer's experts: gate, up, down.

    Raises:
        CheckpointError: if the file is damaged, or of an architecture that is not served.
    """
    fields = Fields(header)
    architecture = architecture_of(fields)
    tensors_of(header, architecture)  # for its checks
    experts = {str(layer): list(types) for layer, types in expert_types(header).items()}
    own = {
        "architectures": [architecture.model_class],
        "model_type": architecture.model_type,
        **architecture.config(fields),
    }
    section = {"quant_method": METHOD, "experts": experts}
    return {**(own if config is None else config), "quantization_config": section}


def _name(header: GgufHeader, tokenizer: bool, config: Mapping[str, Any] | None) -> str:
    """A name that changes with the file, with what is wanted of it, and with this program."""
    status = [(str(part.absolute()), part.stat()) for part in header.files]
    said = json.dumps(
        [
            (WRITTEN, lvllm.__version__, tokenizer, config),
            [(path, one.st_size, one.st_mtime_ns) for path, one in status],
        ]
    )
    digest = hashlib.sha256(said.encode()).hexdigest()[:16]
    return f"{header.file.stem[:60]}-{digest}"


def _write(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2))
