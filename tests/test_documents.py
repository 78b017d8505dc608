"""lvllm.documents: whatever a user's YAML is, it ends soon, in values or in one line."""

import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lvllm.documents import DocumentError, parse, read

BOMB = "a0: &a0 [x, x, x]\n" + "\n".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)
)
TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=20)
PLAIN: Any = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**99), 10**99)
    | st.floats(allow_nan=False)
    | TEXTS
    | st.dates().map(str),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=8,
)
WORDS = ("a", "1", "017", "0x1", "1:30", ".5", ".inf", "2026-01-01", "on", "\\U", "---", "x: ")
MARKS = ("- ", ": ", "&a ", "*a ", "<<: ", "!!int ", "!!map ", "!!bool ")
PIECES = st.sampled_from((*"[]{}:,-?&*!|>%@`'\"#\n ~=\t", *MARKS, *WORDS))


def refusal(text: str) -> str:
    with pytest.raises(DocumentError) as caught:
        parse(text)
    (line,) = str(caught.value).splitlines()
    return line


@given(PLAIN)
def test_what_pyyaml_writes_is_read_as_it_was(value: Any) -> None:
    assert parse(yaml.safe_dump(value, allow_unicode=True)) == value


@settings(max_examples=500)
@given(st.lists(PIECES | TEXTS, max_size=30).map("".join))
def test_any_text_is_values_or_one_line(text: str) -> None:
    def check(value: Any) -> None:
        assert value is None or type(value) in (bool, int, float, str, list, dict)
        for name in value if isinstance(value, dict) else ():
            assert isinstance(name, str)
        inner = value.values() if isinstance(value, dict) else value
        for each in inner if isinstance(value, list | dict) else ():
            check(each)

    try:
        value = parse(text)
    except DocumentError:
        refusal(text)
    else:
        check(value)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[" * 60_000, "line 1: more than 50 levels"),
        ("? " * 30_000, "line 1: more than 50 levels"),
        (BOMB, "characters, with aliases replaced"),
        (f"- &a {'x' * 30_000}\n- [{'*a,' * 9000}]", "characters, with aliases replaced"),
        ("x: 1\na: &a [*a]", "line 2: the alias *a stands within what it stands for"),
        ("a: &a {<<: *a}", "line 1: the alias *a stands within what it stands for"),
        ("#" * 70_000, "more than 65536 characters"),
        ("b: 1\na: 1\nb: 2", "line 3: 'b' is written twice"),
        ("x: {a: 1, 'a': 2}", "line 1: 'a' is written twice"),
        ("1: a", "line 1: the name '1' is no text; put it in quotes"),
        ("null: a", "the name 'null' is no text"),
        ("on: a", "the name 'on' is no text"),
        ("? [a]\n: b", "a name is a text, not a list or a mapping"),
        ("? !!str [a]\n: b", "a name is a text, not a list or a mapping"),
        (
            "a: 017",
            "line 1: '017' is no plain decimal number of up to 100 digits; put it in quotes",
        ),
        ("a: 0x1F", "'0x1F' is no plain"),
        ("a: 1:30", "'1:30' is no plain"),
        ("a: 1:30.5", "'1:30.5' is no plain"),
        ("a: 1_000", "'1_000' is no plain"),
        ("a: +1", "'+1' is no plain"),
        (f"a: {'1' * 5000}", "is no plain"),
        ("a: !!int x", "'x' is no plain"),
        ("a: !!bool x", "'x' is neither true nor false"),
        ("a: !!python/object:os.system x", "the tag 'tag:yaml.org,2002:python/object:os.syste'"),
        ("a: !!set {b}", "the tag 'tag:yaml.org,2002:set' is not allowed"),
        (r'a: "\UFFFFFFFF"', "not YAML: "),
        (f"%YAML 1.{'9' * 5000}\n--- a", "not YAML: "),
        ("a: \0", "not YAML: unacceptable character #x0000"),
        ("a: [", "not YAML: while parsing a flow node"),
        ("a: 1\n---\nb: 1", "not YAML: expected a single document"),
    ],
    ids=lambda text: text[:20],
)
def test_refusals(text: str, line: str) -> None:
    tracemalloc.start()
    try:
        assert line in refusal(text)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_aliases_and_merged_mappings_are_allowed() -> None:
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: *a"
    assert parse(text) == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": {"x": 1, "y": 2}}


def test_dates_are_texts() -> None:
    assert parse("[2026-01-31, 2026-13-45, =]") == ["2026-01-31", "2026-13-45", "="]


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    file.write_bytes("\ufeffa: 内存".encode())
    assert read(file) == {"a": "内存"}
    os.mkfifo(tmp_path / "pipe")
    written = {"latin": b"a: \xe4", "utf16": "a: 1".encode("utf-16"), "large": b"#" * 65_537}
    # Fewer characters than are allowed, in more bytes.
    written["wide"] = ("#" + "内" * 30_000).encode()
    for name, content in written.items():
        (tmp_path / name).write_bytes(content)
    for path, line in (
        (tmp_path, "not a regular file"),
        (tmp_path / "pipe", "not a regular file"),
        (Path("/dev/zero"), "not a regular file"),
        (tmp_path / "none", "No such file or directory"),
        (file / "x", "Not a directory"),
        (tmp_path / ("x" * 300), "File name too long"),
        (tmp_path / "latin", "not UTF-8: unexpected end of data at byte 3"),
        (tmp_path / "utf16", "not UTF-8: invalid start byte at byte 0"),
        (tmp_path / "large", "more than 65536 bytes, the most that is read"),
        (tmp_path / "wide", "more than 65536 bytes, the most that is read"),
    ):
        with pytest.raises(DocumentError) as caught:
            read(path)
        assert str(caught.value) == line
