"""Repositories on the Hugging Face hub and on ModelScope, through the hubs' own libraries."""

import fnmatch
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lvllm.errors import LvllmError

__all__ = [
    "HubError",
    "Repository",
    "Source",
    "fetch",
    "open_repository",
    "source_by_environment",
]

Source = Literal["hf", "modelscope"]

OTHER_WEIGHTS = ["*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.h5", "*.msgpack", "original/*"]
"""The same weights in other forms, which are left out where there are safetensors files."""


class HubError(LvllmError):
    """A hub that did not give what it was asked for. The text is one line."""


@dataclass(frozen=True)
class Repository:
    """A repository with the files that were chosen from it."""

    name: str
    source: Source
    sizes: dict[str, int]
    """Bytes of each chosen file."""

    @property
    def bytes(self) -> int:
        return sum(self.sizes.values())

    def fetch(self, to: Path | None, only: Sequence[str] | None = None) -> Path:
        """Download the chosen files, or `only` some of them, as `fetch` does."""
        chosen = [name for name in self.sizes if only is None or name in only]
        return fetch(self.name, self.source, chosen, to)


def fetch(name: str, source: Source, files: Sequence[str], to: Path | None = None) -> Path:
    """Download files of the repository `name`, or take them from the hub's cache. Returns a folder.

    What is there already is kept: downloads go on where they stopped, and the hub's library
    compares what it gets with the hub's own sizes and hashes. Without `to`, files go into the hub's
    cache, where `vllm serve` finds them by the repository's name.

    Raises HubError.
    """
    where = None if to is None else str(to)
    with _hub_errors(name, source):
        if source == "modelscope":
            from modelscope.hub.snapshot_download import snapshot_download as from_modelscope

            return Path(from_modelscope(name, allow_file_pattern=list(files), local_dir=where))
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=list(files), local_dir=where))


def source_by_environment() -> Source:
    """The hub that vLLM would ask: ModelScope if VLLM_USE_MODELSCOPE=True, else Hugging Face."""
    asked = os.environ.get("VLLM_USE_MODELSCOPE", "").lower() in ("1", "true")
    return "modelscope" if asked else "hf"


def open_repository(
    name: str, source: Source, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> Repository:
    """The repository `name` with the files that match `include` and do not match `exclude`.

    Without `include`, all files are chosen but the same weights in other forms.

    Raises HubError, also if no file is chosen.
    """
    with _hub_errors(name, source):
        sizes = _modelscope_sizes(name) if source == "modelscope" else _hugging_face_sizes(name)
    if not include and any(file.endswith(".safetensors") for file in sizes):
        exclude = [*exclude, *OTHER_WEIGHTS]
    chosen = {
        file: size
        for file, size in sizes.items()
        if (not include or _matches(file, include)) and not _matches(file, exclude)
    }
    if not chosen:
        raise HubError(f"{name}: none of its {len(sizes)} files is chosen by the patterns")
    return Repository(name, source, chosen)


def _matches(file: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(file, pattern) for pattern in patterns)


def _hugging_face_sizes(name: str) -> dict[str, int]:
    from huggingface_hub import HfApi

    files = HfApi().model_info(name, files_metadata=True).siblings or []
    return {file.rfilename: file.size or 0 for file in files}


def _modelscope_sizes(name: str) -> dict[str, int]:
    from modelscope.hub.api import HubApi

    files: list[dict[str, Any]] = HubApi().get_model_files(name, recursive=True)
    return {file["Path"]: int(file["Size"]) for file in files if file["Type"] != "tree"}


@contextmanager
def _hub_errors(name: str, source: Source) -> Iterator[None]:
    """Turn what the hubs' libraries raise, of which each has many kinds, into one line."""
    hub = {"hf": "the Hugging Face hub", "modelscope": "ModelScope"}[source]
    try:
        yield
    except ImportError:
        raise HubError(f"{name}: modelscope is not installed: pip install modelscope") from None
    except Exception as error:
        said = " ".join(str(error).split())[:300]
        raise HubError(f"{name}: {hub} did not answer as it should: {said}") from None
