"""What the user says in arguments of `vllm serve`, in its YAML file and in the environment."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from lvllm.settings import config_file
from lvllm.settings.resolving import Setting, resolve

__all__ = ["Given", "count", "read"]

SHORT = {
    "-tp": "tensor-parallel-size",
    "-pp": "pipeline-parallel-size",
    "-dp": "data-parallel-size",
}
"""vLLM's short options that the planner has to know."""


@dataclass(frozen=True)
class Given:
    """Everything that was given, by vLLM's names with dashes."""

    words: tuple[str, ...] = ()
    """The arguments as they came, with the model first if there is one among them."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options by their names without leading dashes. The command line wins over the file."""
    settings: Mapping[str, Setting] = field(default_factory=dict)
    """LvLLM's own settings by their keys."""

    @property
    def lvllm(self) -> frozenset[str]:
        """The keys of LvLLM's own settings that were given anywhere."""
        return frozenset(key for key, one in self.settings.items() if one.source != "default")

    @property
    def model(self) -> str | None:
        """The model's folder or id; None if nobody named one."""
        if self.words and not self.words[0].startswith("-"):
            return self.words[0]
        named = self.options.get("model")
        return None if named is None else str(named)


def read(words: Sequence[str], environ: Mapping[str, str]) -> Given:
    """What arguments and environment give.

    Raises SettingError if the file of `--config` cannot be read, or for a value of LvLLM's own that
    is not allowed.
    """
    arguments = _options(words)
    file: dict[str, Any] = {}
    if path := arguments.get("config"):
        file = config_file.read(Path(str(path)))
    options = {**file, **_parsed(arguments)}
    if environ.get("VLLM_CPU_KVCACHE_SPACE"):  # vLLM's variable for the same, in GiB
        options.setdefault("kv-cache-memory-bytes", environ["VLLM_CPU_KVCACHE_SPACE"])
    section = config_file.section(options)
    return Given(tuple(words), options, resolve(environ, section))


def _options(words: Sequence[str]) -> dict[str, Any]:
    """Options by name; a switch is True. vLLM takes `_` for `-`, and `--name=value`, too."""
    found: dict[str, Any] = {}
    last: str | None = None
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            name = config_file.normal(name)
            found[name] = value if equals else True
            last = None if equals else name
        elif word in SHORT:
            last = SHORT[word]
            found[last] = True
        else:
            if last is not None:
                found[last] = word
            last = None
    return found


def _parsed(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """With the values of additional_config, which a command line gives as JSON, where they are."""
    found = dict(arguments)
    for name, value in arguments.items():
        if name.startswith("additional") and isinstance(value, str):
            with suppress(ValueError):  # any other text
                found[name] = from_json(value)
    return found


def count(value: Any) -> int | None:
    """A number of tokens as vLLM reads it: 4096, 8k (8000), 8K (8192). None: it is no number."""
    units = {"k": 1000, "m": 10**6, "K": 1 << 10, "M": 1 << 20}
    text = str(value)
    unit = units.get(text[-1:], 1)
    try:
        found = int(float(text[:-1]) * unit) if unit > 1 else int(text)
    except (ValueError, OverflowError):
        return None
    return found if found > 0 else None
