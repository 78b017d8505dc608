"""Quantise the experts of a checkpoint and write a compressed-tensors checkpoint.

    export(Path("MODEL"), Path("OUT"), format="int4")

Each file of weights becomes a file of the same name, and each layer of a GGUF file becomes a file.
The header of the new file follows from the header of the old one, so that it can be written first,
and tensors are read, quantised and written one by one. The export needs memory for the largest
tensor, for what that tensor becomes, and for the work of `lvllm.engine.quantize`.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from lvllm.checkpoint.gguf.finding import gguf_of
from lvllm.checkpoint.gguf.folder import configuration, present
from lvllm.checkpoint.gguf_headers import open_gguf
from lvllm.checkpoint.headers import INDEX, CheckpointError, TensorInfo
from lvllm.engine import quantize
from lvllm.export import dtype_config, folder, fused, selection
from lvllm.export.config import quantization_config
from lvllm.export.dtype_config import FormatRules
from lvllm.export.gguf_source import GgufShard, shards
from lvllm.export.schemes import FORMATS, Format, Scheme, scheme
from lvllm.export.tensorfile import ExportError, Tensor, TensorFile, size_of_file, write

__all__ = ["FORMATS", "ExportError", "Format", "FormatRules", "export"]


def export(
    model: Path,
    out: Path,
    *,
    format: str | Format | FormatRules,
    linears: bool = False,
    tokenizer: Path | None = None,
    quiet: bool = False,
) -> None:
    """Write the checkpoint `model` to `out`, its experts in one of FORMATS.

    Args:
        model: the folder of an unquantised checkpoint, or a GGUF file of any types or its folder.
        format: the experts' format, or rules that say which modules get which format.
        linears: also quantise the linear layers of attention, dense layers and shared experts.
            Rules say that themselves.
        tokenizer: a folder whose tokenizer is written in the place of that of `model`.
        quiet: show no progress bar.

    If an export was killed, the same call goes on where it stopped. Nothing is overwritten. Raises
    ExportError or OSError.
    """
    how = Format.model_validate(format) if isinstance(format, str) else format
    source = _of_gguf(model, own_tokenizer=tokenizer is None) or _of_folder(model)
    folder.check_apart(model, out)
    others = folder.other_files(source.folder)
    if tokenizer is not None:
        of_tokenizer = folder.tokenizer_files(tokenizer)
        others = [path for path in others if not folder.is_of_tokenizer(path)] + of_tokenizer
    with ExitStack() as stack:
        for file in source.files:
            stack.enter_context(file)
        work = _Export(source.files, how, linears, source.architecture)
        stack.enter_context(
            folder.working_in(
                out,
                {
                    "format": str(how),
                    "linears": linears,
                    "source": {
                        str(path.resolve()): [path.stat().st_size, path.stat().st_mtime_ns]
                        for path in source.stored
                    },
                },
            )
        )
        work.write_shards(out, others, quiet)
        for path in others:
            shutil.copyfile(path, out / path.name)
        _write_json(out / INDEX, work.index())
        _write_json(out / "config.json", source.config | {"quantization_config": work.config()})


@dataclass(frozen=True)
class _Source:
    """What is exported."""

    config: dict[str, Any]
    folder: Path
    """Where the tokenizer and the other small files are."""
    files: Sequence[TensorFile | GgufShard]
    """The files to write, as they can be read."""
    stored: Sequence[Path]
    """The files that have the weights."""

    @property
    def architecture(self) -> str:
        match self.config.get("architectures"):
            case [str(architecture), *_]:
                return architecture
        return "this model"


def _of_folder(model: Path) -> _Source:
    """A checkpoint of safetensors. Raises ExportError."""
    config = folder.read_config(model)
    checkpoint = folder.read_headers(model)
    placed: dict[Path, list[TensorInfo]] = {path: [] for path in checkpoint.files}
    source = _Source(config, model, [], checkpoint.files)
    for tensor in fused.split(checkpoint.tensors.values(), source.architecture):
        placed[tensor.file].append(tensor)
    return replace(source, files=[TensorFile(path, tensors) for path, tensors in placed.items()])


def _of_gguf(model: Path, own_tokenizer: bool) -> _Source | None:
    """The model in GGUF files; None: `model` is something else. Raises ExportError."""
    try:
        file = gguf_of(str(model))
        if file is None:
            return None
        shown = present(file, tokenizer=own_tokenizer)
        header = open_gguf(file)
        config = configuration(header)
        del config["quantization_config"]
        return _Source(config, shown, shards(header), header.files)
    except CheckpointError as error:
        raise ExportError(str(error)) from None


class _Export:
    """The tensors of a checkpoint, and the tensors that each of them becomes."""

    def __init__(
        self,
        files: Sequence[TensorFile | GgufShard],
        how: Format | FormatRules,
        linears: bool,
        architecture: str,
    ) -> None:
        self.files = files
        self.places: dict[str, TensorFile | GgufShard] = {}
        for file in files:
            self.places |= dict.fromkeys(file.tensors, file)
        self.formats = self._chosen(how, linears, architecture)
        self.schemes = {format: scheme(format) for format in self.formats.values()}
        self.planned = {
            file: {
                name: self._scheme(name).replacements(tensor) if name in self.formats else [tensor]
                for name, tensor in file.tensors.items()
            }
            for file in files
        }
        # vLLM merges some projections of a module into one: gate and up, and q, k and v. For some
        # formats they must then share a scale.
        self._siblings: dict[str, list[str]] = {}
        for name, format in sorted(self.formats.items()):
            if self.schemes[format].shares_scale:
                parent = selection.module(name).rpartition(".")[0]
                self._siblings.setdefault(parent, []).append(name)
        self._global_scales: dict[str, torch.Tensor] = {}

    def _chosen(
        self, how: Format | FormatRules, linears: bool, architecture: str
    ) -> dict[str, Format]:
        """The formats of the tensors that are quantised, by name."""
        by_rules = not isinstance(how, Format)
        tensors = list(self._tensors())
        found = selection.quantizable(tensors, linears or by_rules, architecture)
        if isinstance(how, Format):
            formats = dict.fromkeys(found, how)
        else:
            named = {selection.module(name): name for name in found}
            modules = {selection.module(tensor.name) for tensor in tensors}
            chosen = dtype_config.chosen(how, named, modules)
            formats = {named[name]: format for name, format in chosen.items()}
        for name in formats:
            selection.check(found[name])
        return formats

    def _tensors(self) -> Iterator[Tensor]:
        for file in self.files:
            yield from file.tensors.values()

    def _made(self, file: TensorFile | GgufShard) -> list[Tensor]:
        """All tensors of the file that is written for `file`."""
        return [tensor for made in self.planned[file].values() for tensor in made]

    def index(self) -> dict[str, Any]:
        made = [(file.path.name, tensor) for file in self.files for tensor in self._made(file)]
        return {
            "metadata": {"total_size": sum(tensor.size for _, tensor in made)},
            "weight_map": {tensor.name: name for name, tensor in made},
        }

    def config(self) -> dict[str, Any]:
        """`quantization_config` of config.json."""
        formats = {selection.module(name): format for name, format in self.formats.items()}
        left = selection.left(self._tensors(), self.formats)
        return quantization_config(formats, self.schemes, left)

    def write_shards(self, out: Path, others: list[Path], quiet: bool) -> None:
        """Write every file that is not in `out` yet. The progress bar counts the bytes read."""
        wanted = sum(path.stat().st_size for path in others)
        missing = []
        for file in self.files:
            path = out / file.path.name
            path.with_name(path.name + ".unfinished").unlink(missing_ok=True)
            size = size_of_file(self._made(file))
            if not path.exists() or path.stat().st_size != size:
                missing.append(file)
                wanted += size
        folder.check_space(out, wanted)
        total = sum(tensor.size for tensor in self._tensors())
        with tqdm(
            total=total,
            initial=total - sum(t.size for file in missing for t in file.tensors.values()),
            desc=f"{out.name}: {len(self.files)} file(s)",
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            disable=quiet,
        ) as bar:
            for file in missing:
                write(out / file.path.name, self._made(file), self._data(file, bar))

    def _data(self, file: TensorFile | GgufShard, bar: Any) -> Iterator[torch.Tensor]:
        """The values of the tensors that `_made` lists, in that order."""
        for name, tensors in self.planned[file].items():
            data = file.read(name)
            if name in self.formats:
                try:
                    made = self._scheme(name).make(data, **self._shared(name))
                except ValueError as error:
                    raise ExportError(f"{file.path}: {name}: {error}") from None
                stem = name.removesuffix("weight")
                for tensor in tensors:
                    yield made[tensor.name.removeprefix(stem)]
            else:
                yield data
            bar.update(file.tensors[name].size)

    def _scheme(self, name: str) -> Scheme:
        return self.schemes[self.formats[name]]

    def _shared(self, name: str) -> dict[str, torch.Tensor]:
        """The global scale that `name` shares with the other projections of its module."""
        if not self._scheme(name).shares_scale:
            return {}
        parent = selection.module(name).rpartition(".")[0]
        if parent not in self._global_scales:
            scales = [
                quantize.nvfp4_global_scale(self.places[sibling].read(sibling))
                for sibling in self._siblings[parent]
            ]
            self._global_scales[parent] = torch.stack(scales).amax()
        return {"global_scale": self._global_scales[parent]}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
