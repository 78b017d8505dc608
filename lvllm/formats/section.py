"""The types of what LvLLM reads of `quantization_config` in a config.json.

Each format reads its own keys. A value of another type would end in any error far from here.
"""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from lvllm import patterns
from lvllm.checkpoint.headers import CheckpointError
from lvllm.errors import quoted

__all__ = ["check", "pattern_of"]

SECTION = "quantization_config"


def check(section: Any) -> None:
    """Raise CheckpointError, in one line, for a section with a value of a wrong type."""
    if not isinstance(section, Mapping):
        raise CheckpointError(f"config.json: {SECTION} is {quoted(section)}: a mapping is wanted")
    try:
        _Section.model_validate(section)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part)[:100] for part in (SECTION, *first["loc"]))
        said = first["msg"].removeprefix("Value error, ")
        raise CheckpointError(
            f"config.json: {where!r} is {quoted(first['input'])}: {said}"
        ) from None


def pattern_of(entry: str) -> str | None:
    """The regular expression of an entry in a list of modules; None: it is a name."""
    pattern = entry.removeprefix("re:").removeprefix("-:").removeprefix("+:")
    return None if pattern == entry else pattern


def _checked_entry(entry: str) -> str:
    if (pattern := pattern_of(entry)) is not None:
        patterns.check(pattern)
    return entry


class _Part(BaseModel):
    """A mapping with any keys, of which those that are read have types."""

    model_config = ConfigDict(strict=True)


_Bits = Annotated[int, Field(ge=1, le=64)] | None
_Size = Annotated[int, Field(ge=-1, le=2**31)] | None


class _Numbers(_Part):
    bits: _Bits = None
    w_bit: _Bits = None
    num_bits: _Bits = None
    group_size: _Size = None
    q_group_size: _Size = None


_Entry = Annotated[str, AfterValidator(_checked_entry)]
_Modules = list[_Entry] | dict[_Entry, _Numbers] | None


class _Group(_Numbers):
    weights: _Numbers | None = None
    targets: list[_Entry] = []


class _Nested(_Part):
    exclude_modules: _Modules = None


class _Section(_Numbers):
    quant_method: str | None = None
    config_groups: dict[str, _Group] | None = None
    quantization: _Nested = _Nested()
    ignore: _Modules = None
    ignored_layers: _Modules = None
    modules_to_not_convert: _Modules = None
    exclude_modules: _Modules = None
    dynamic: _Modules = None
    extra_config: _Modules = None
