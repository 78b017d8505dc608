"""The headers of GGUF files: what they say of a model, and its tensors' names, shapes and types.

A GGUF file is "GGUF", a version, the numbers of tensors and of fields, the fields, a description of
each tensor, and the data, all little-endian
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). A model may be in several files, whose
names end in -00001-of-00003.gguf; the first one has the fields.

The gguf package knows the types. Its reader does not serve here: it makes an array of each word of
the vocabulary, which takes 14 s for 150 000 words, it wants the data to be there, and a damaged
length keeps it busy for ever.
"""

import math
import mmap
import os
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lvllm.checkpoint.files import open_regular
from lvllm.checkpoint.headers import LFS_POINTER, CheckpointError, pointer_refused
from lvllm.errors import quoted
from lvllm.units import ceil_div

__all__ = ["GgufHeader", "GgufTensor", "first_of_part", "is_gguf", "open_gguf", "read_gguf_header"]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
"""Version 1, of 2023, has lengths of 32 bits."""
LONGEST_HEADER = 1 << 27
"""Bytes that are looked at. Headers of published files have up to 20 MB, most of it vocabulary."""
LONGEST_LIST = 4096
"""Longer lists are of a vocabulary. Lists of values for each layer are shorter."""
DIMENSIONS = 4
STRING, ARRAY = 8, 9
MOST_TENSORS = 1 << 17
"""Old files have a tensor for each expert, 36 000 in the largest models."""
MOST_FIELDS = 1 << 12
VOCABULARY = tuple(
    f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "merges", "scores")
)
"""The lists that make a tokenizer."""
MOST_WORDS = 1 << 21
"""Longer lists are of no vocabulary. The largest of published models have 260 000 words."""
ALIGNMENT = 32
"""Bytes of whose multiple the data begin, unless a field says otherwise."""
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
"""Types of fields, by their number, as `struct` calls them."""
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")

Scalar = str | int | float | bool
Field = Scalar | Sequence[Scalar]


@dataclass(frozen=True, slots=True)
class GgufTensor:
    name: str
    shape: tuple[int, ...]
    """The inputs come first: a matrix is (columns, rows), experts are (columns, rows, experts)."""
    type: str
    """As ggml calls it: Q4_K, F32."""
    nbytes: int
    file: Path
    start: int
    """The byte of the file at which the data begin."""

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    def refuse(self, fault: str) -> CheckpointError:
        """An error about this tensor."""
        return CheckpointError(f"{self.file}: tensor {quoted(self.name)}: {fault}")


@dataclass(frozen=True)
class GgufHeader:
    """The fields and the tensors of a model in one or more files."""

    file: Path
    """The file, or the first one of its parts."""
    fields: dict[str, Field]
    """Without lists of strings and lists of more than LONGEST_LIST values. If it was read with the
    vocabulary, it has those of `VOCABULARY`."""
    tensors: dict[str, GgufTensor]
    files: tuple[Path, ...] = ()
    """All parts, in order."""


def is_gguf(file: Path) -> bool:
    """Whether a file is to be read as GGUF, by its name or, if it has another, by its begin."""
    if file.suffix == ".gguf":
        return True
    try:
        with os.fdopen(open_regular(file), "rb") as opened:
            return opened.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def first_of_part(file: Path) -> Path:
    """The first part of the model of which `file` is a part, or `file`, by its name."""
    return file.with_name(_PART.sub(r"-00001-of-\2.gguf", file.name))


def open_gguf(file: Path, *, vocabulary: bool = False) -> GgufHeader:
    """The header of a model's only file, or of all its parts, of which `file` is one.

    With the `vocabulary`, its fields have the lists of the tokenizer, too.

    Raises:
        CheckpointError: a file that is not there or cannot be read.
    """
    found = _PART.search(file.name)
    count = int(found[2]) if found else 1
    names = [_PART.sub(f"-{i + 1:05}-of-{count:05}.gguf", file.name) for i in range(count)]
    parts = [file.with_name(name) for name in names] if found else [file]
    missing = [part for part in parts if not part.exists()]
    if missing and found:
        raise CheckpointError(
            f"{missing[0]}: is not there; {len(missing)} of the model's {count} files are missing"
        )
    headers = [
        read_gguf_header(part, vocabulary=vocabulary and number == 0)
        for number, part in enumerate(parts)
    ]
    first = headers[0]
    if not found and first.fields.get("split.count", 1) != 1:
        raise CheckpointError(
            f"{file}: is one of {first.fields['split.count']} files of a model, whose names must"
            " end in -00001-of-00003.gguf"
        )
    tensors: dict[str, GgufTensor] = {}
    for header in headers:
        for name, tensor in header.tensors.items():
            if name in tensors:
                raise CheckpointError(
                    f"{header.file}: tensor {quoted(name)} is in another part too"
                )
            tensors[name] = tensor
    wanted = first.fields.get("split.tensors.count", len(tensors))
    if wanted != len(tensors):
        raise CheckpointError(
            f"{first.file}: {wanted} tensors are wanted, and the {count} files have {len(tensors)}"
        )
    return GgufHeader(first.file, first.fields, tensors, tuple(parts))


def read_gguf_header(path: Path, *, vocabulary: bool = False) -> GgufHeader:
    """The header of one file. Its data are not looked at, and may be missing.

    Raises:
        CheckpointError: a file that cannot be read, or is no GGUF file that this function knows.
    """
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(len(LFS_POINTER))
            if start == LFS_POINTER:
                raise pointer_refused(path)
            if start[:4] != MAGIC[: max(1, len(start))]:
                raise CheckpointError(
                    f"{path}: is no GGUF file: it begins with {start[:4]!r}"
                    if start
                    else f"{path}: is empty, and no GGUF file"
                )
            with mmap.mmap(
                file.fileno(), min(size, LONGEST_HEADER), access=mmap.ACCESS_READ
            ) as data:
                return _Reader(path, data, size, vocabulary).header()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None


class _Reader:
    """Reads a header from its begin to its end."""

    def __init__(self, path: Path, data: mmap.mmap, size: int, vocabulary: bool) -> None:
        self._path = path
        self._data = data
        self._size = size
        self._vocabulary = vocabulary
        self._at = len(MAGIC)

    def header(self) -> GgufHeader:
        self._check_version()
        tensors, fields = self._number("Q"), self._number("Q")
        values: dict[str, Field] = {}
        for number in range(fields):
            if number == MOST_FIELDS:
                raise self._refuse(f"has {fields} fields, allowed are {MOST_FIELDS}")
            name = self._string()
            value = self._field(name)
            if value is not None:
                values[name] = value
        found: dict[str, GgufTensor] = {}
        sizes = _type_sizes()
        for number in range(tensors):
            if number == MOST_TENSORS:
                raise self._refuse(f"has {tensors} tensors, allowed are {MOST_TENSORS}")
            tensor = self._tensor(sizes)
            if tensor.name in found:
                raise self._refuse(f"tensor {quoted(tensor.name)} is in the header twice")
            found[tensor.name] = tensor
        data = self._data_start(values.get("general.alignment", ALIGNMENT))
        placed = {
            name: replace(tensor, start=data + tensor.start) for name, tensor in found.items()
        }
        return GgufHeader(self._path, values, placed, (self._path,))

    def _data_start(self, alignment: Field) -> int:
        """The byte at which the data begin: the next multiple of the alignment."""
        if type(alignment) is not int or not 1 <= alignment <= 1 << 20:
            raise self._refuse(
                f"field 'general.alignment' is {quoted(alignment)}, allowed is 1 to {1 << 20}"
            )
        return ceil_div(self._at, alignment) * alignment

    def _check_version(self) -> None:
        version = self._number("I")
        if version in VERSIONS:
            return
        if version & 0xFFFF == 0 and version >> 24 in VERSIONS:
            raise self._refuse("is a big-endian GGUF file; a little-endian one is wanted")
        known = " and ".join(map(str, VERSIONS))
        raise self._refuse(f"is of GGUF's version {version}; known are {known}")

    def _field(self, name: str) -> Field | None:
        """A field's value; None for a list that is left out."""
        kind = self._number("I")
        if kind == STRING:
            return self._string()
        if kind in SCALARS:
            return self._scalar(SCALARS[kind])
        if kind != ARRAY:
            raise self._refuse(f"field {quoted(name)} is of the unknown type {kind}")
        kind, count = self._number("I"), self._number("Q")
        whole = self._vocabulary and name in VOCABULARY
        if whole and count > MOST_WORDS:
            raise self._refuse(
                f"field {quoted(name)} is a list of {count} values, allowed are {MOST_WORDS}"
            )
        if kind == STRING:
            if whole:
                return [self._string() for _ in range(count)]
            for _ in range(count):
                self._skip(self._number("Q"))
            return None
        if kind not in SCALARS:
            raise self._refuse(f"field {quoted(name)} is a list of the unknown type {kind}")
        code = SCALARS[kind]
        start, size = self._at, count * struct.calcsize(f"<{code}")
        self._skip(size)
        if count > LONGEST_LIST and not whole:
            return None
        return list(struct.unpack(f"<{count}{code}", self._data[start : start + size]))

    def _tensor(self, sizes: Callable[[int], tuple[str, int, int] | None]) -> GgufTensor:
        name = self._string()
        dimensions = self._number("I")
        if not 1 <= dimensions <= DIMENSIONS:
            raise self._refuse(
                f"tensor {quoted(name)} has {dimensions} dimensions, allowed are 1 to {DIMENSIONS}"
            )
        shape = tuple(self._number("Q") for _ in range(dimensions))
        if 0 in shape:
            raise self._refuse(f"tensor {quoted(name)} has the shape {shape}, which holds nothing")
        kind = self._number("I")
        start = self._number("Q")
        known = sizes(kind)
        if known is None:
            raise self._refuse(f"tensor {quoted(name)} is of the unknown type {kind}")
        type_name, block, block_bytes = known
        if shape[0] % block:
            raise self._refuse(
                f"tensor {quoted(name)} has rows of {shape[0]} weights, {type_name} has blocks of"
                f" {block}"
            )
        nbytes = math.prod(shape) // block * block_bytes
        return GgufTensor(name, shape, type_name, nbytes, self._path, start)

    def _scalar(self, code: str) -> int | float | bool:
        try:
            (value,) = struct.unpack_from(f"<{code}", self._data, self._at)
        except struct.error:
            raise self._cut() from None
        self._at += struct.calcsize(f"<{code}")
        found: int | float | bool = value
        return found

    def _number(self, code: str) -> int:
        return int(self._scalar(code))

    def _string(self) -> str:
        size = self._number("Q")
        start = self._at
        self._skip(size)
        try:
            return self._data[start : self._at].decode()
        except UnicodeDecodeError:
            raise self._refuse(f"has a name or text that is not UTF-8, at byte {start}") from None

    def _skip(self, size: int) -> None:
        self._at += size
        if self._at > len(self._data):
            raise self._cut()

    def _cut(self) -> CheckpointError:
        if self._size > len(self._data):
            return self._refuse(f"has a header of more than {LONGEST_HEADER} bytes, or a wrong one")
        return self._refuse(f"truncated: has {self._size} bytes, and its header has more")

    def _refuse(self, fault: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: {fault}")


def _type_sizes() -> Callable[[int], tuple[str, int, int] | None]:
    """A function from a type's number to its name, and a block's weights and bytes."""
    # The package takes 0.7 s to import, which only GGUF files are to pay for.
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    known = {int(kind): (kind.name, *GGML_QUANT_SIZES[kind]) for kind in GGMLQuantizationType}
    return known.get
