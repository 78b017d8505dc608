"""YAML that a user wrote: files and texts, read within bounds.

JSON is YAML, too. Whatever the text is, reading ends soon, takes little memory, and gives either
plain values or a DocumentError. The values are None, booleans, numbers, texts, lists, and mappings
whose names are texts.

This is stricter than YAML 1.1, as PyYAML reads it, where a reader of the file would be surprised:
a name may be written only once, a number has plain decimal digits (YAML 1.1 reads `017` as 15 and
`1:30` as 90), and a date is a text.
"""

import re
import stat
from pathlib import Path
from typing import Any

import yaml

from lvllm.errors import LvllmError

__all__ = ["DocumentError", "parse", "read", "read_text"]

MOST_BYTES = 1 << 16
"""PyYAML reads so much in a second. The configurations in `examples/configs` have 2 KB."""
MOST_CHARACTERS = 1 << 18
"""With each alias counted as what it stands for: 1 KB of aliases of aliases can mean terabytes."""
MOST_LEVELS = 50
"""PyYAML calls itself for each level, and Python allows about 1000 calls within each other."""

_TAG = "tag:yaml.org,2002:"
_NUMBERS = {
    _TAG + "int": re.compile(r"-?(0|[1-9][0-9]{0,99})"),
    _TAG + "float": re.compile(
        r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", re.IGNORECASE
    ),
}
_TEXTS = (_TAG + "timestamp", _TAG + "value")
"""Dates, and a single `=`."""
_OTHERS = frozenset(_TAG + name for name in ("null", "bool", "str", "seq", "map", "merge"))


class DocumentError(LvllmError):
    """A text or a file that is not allowed; the text of the error does not name the file."""


def read(path: Path) -> Any:
    """The value in a file. Raises DocumentError."""
    return parse(read_text(path))


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """The text in a regular file of UTF-8 with `most` bytes. Raises DocumentError."""
    try:
        # Opening a pipe could wait for ever, and a device may have no end.
        if not stat.S_ISREG(path.stat().st_mode):
            raise DocumentError("not a regular file")
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise DocumentError(str(error.strerror)) from None
    if len(data) > most:
        raise DocumentError(f"more than {most} bytes, the most that is read")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DocumentError(f"not UTF-8: {error.reason} at byte {error.start}") from None


def parse(text: str) -> Any:
    """The value that a text means. Raises DocumentError."""
    if len(text) > MOST_BYTES:
        raise DocumentError(f"more than {MOST_BYTES} characters, the most that is read")
    try:
        loader = _Loader(text)
        return loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        said = " ".join(f"{error.context or ''} {error.problem}".split())
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark else ""
        raise DocumentError(f"not YAML: {said}{where}") from None
    except DocumentError:
        raise
    # PyYAML lets Python's own errors pass, for example about the character "\UFFFFFFFF".
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise DocumentError(f"not YAML: {' '.join(str(error).split())}") from None


class _Loader(yaml.SafeLoader):
    """PyYAML's reader with bounds, which are checked before values are made."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._level = 0
        self._characters = 0
        self._sizes: dict[yaml.Node, int] = {}
        """The characters of each node that is complete."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self._level == MOST_LEVELS:
            raise _refuse(self.peek_event(), f"more than {MOST_LEVELS} levels")
        is_alias = self.check_event(yaml.AliasEvent)
        event = self.peek_event()
        before = self._characters
        self._level += 1
        node: Any = super().compose_node(parent, index)
        self._level -= 1
        if is_alias and node not in self._sizes:
            raise _refuse(event, f"the alias *{event.anchor} stands within what it stands for")
        if is_alias:
            self._characters += self._sizes[node]
        else:
            own = len(node.value) if isinstance(node, yaml.ScalarNode) else 0
            self._characters += own + 1
            self._sizes[node] = self._characters - before
        if self._characters > MOST_CHARACTERS:
            raise _refuse(event, f"more than {MOST_CHARACTERS} characters, with aliases replaced")
        return node

    def compose_scalar_node(self, anchor: Any) -> Any:
        node = super().compose_scalar_node(anchor)
        if node.tag in _TEXTS:
            node.tag = _TAG + "str"
        elif node.tag in _NUMBERS and not _NUMBERS[node.tag].fullmatch(node.value):
            raise _refuse(
                node,
                f"{node.value[:40]!r} is no plain decimal number of up to 100 digits; put it in"
                " quotes if it is text",
            )
        elif node.tag not in _NUMBERS and node.tag not in _OTHERS:
            raise _refuse(node, f"the tag {node.tag[:40]!r} is not allowed; leave it out")
        elif node.tag == _TAG + "bool" and node.value.lower() not in self.bool_values:
            raise _refuse(node, f"{node.value[:40]!r} is neither true nor false")
        return node

    def compose_sequence_node(self, anchor: Any) -> Any:
        return _check_tag(super().compose_sequence_node(anchor))

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = _check_tag(super().compose_mapping_node(anchor))
        names: set[str] = set()
        for name, _ in node.value:
            if not isinstance(name, yaml.ScalarNode):
                raise _refuse(name, "a name is a text, not a list or a mapping")
            if name.tag not in (_TAG + "str", _TAG + "merge"):
                raise _refuse(name, f"the name {name.value[:40]!r} is no text; put it in quotes")
            if name.value in names:
                raise _refuse(name, f"{name.value[:40]!r} is written twice")
            names.add(name.value)
        return node


def _check_tag(node: Any) -> Any:
    if node.tag not in _OTHERS:
        raise _refuse(node, f"the tag {node.tag[:40]!r} is not allowed; leave it out")
    return node


def _refuse(where: Any, reason: str) -> DocumentError:
    """The error about a node or an event."""
    return DocumentError(f"line {where.start_mark.line + 1}: {reason}")
