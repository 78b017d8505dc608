"""What is refused in config.json and the small files beside it."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lvllm.checkpoint import model_files
from lvllm.checkpoint.headers import CheckpointError

NAMES = (model_files.CONFIG, *model_files.GENERATION, *model_files.TOKENIZER)
SOUND: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": [96, 32],
    "num_key_value_heads": None,
}
SIZE = "is not allowed: a whole number from"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (os.mkfifo, "is no regular file"),
    "folder": (Path.mkdir, "Is a directory"),
    "circle": (lambda file: file.symlink_to(file.name), "Too many levels of symbolic links"),
    "dangling": (lambda file: file.symlink_to("gone"), "is a link to a file that is not there"),
    "bytes": (lambda file: file.write_bytes(b"\xff\xfe{}"), "is no text in UTF-8: invalid start"),
}
NO_OBJECTS = {"": "is no JSON: Expecting value", '{"a": 1': "is no JSON: ", "[1]": "but [1]"}


def write(folder: Path) -> None:
    for name in NAMES:
        (folder / name).write_text(json.dumps(SOUND if name == model_files.CONFIG else {}))


def refused(folder: Path, file: str, fault: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        model_files.check(folder, NAMES)
    said = str(caught.value)
    assert said.startswith(f"{folder / file}: ")
    assert fault in said
    assert "\n" not in said


@pytest.mark.parametrize("name", NAMES)
def test_files_without_an_end(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_files, "MOST_BYTES", 1 << 20)
    write(tmp_path)
    os.truncate(tmp_path / name, 1 << 40)  # no block of it is on the disk
    refused(tmp_path, name, "has more than 1 MiB")


@pytest.mark.parametrize("name", NAMES)
def test_files_that_are_damaged(name: str, tmp_path: Path) -> None:
    write(tmp_path)
    model_files.check(tmp_path, NAMES)
    file = tmp_path / name
    for damage, fault in DAMAGES.values():
        file.unlink()
        damage(file)
        refused(tmp_path, name, fault)
        if file.is_dir() and not file.is_symlink():
            file.rmdir()
        else:
            file.unlink()
        file.write_text("{}")
    for text, fault in NO_OBJECTS.items():
        file.write_text(text)
        if name.endswith(".json"):
            refused(tmp_path, name, fault)
        else:
            model_files.check(tmp_path, NAMES)
    file.unlink()
    model_files.check(tmp_path, NAMES)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "tokenizer.json").chmod(0)
    refused(tmp_path, "tokenizer.json", "Permission denied")


@pytest.mark.parametrize("value", [-1, "8", 2.5, True, 10**13, float("nan"), {}, [4, -1], [[4]]])
@pytest.mark.parametrize("key", SOUND)
def test_sizes_that_are_none(key: str, value: Any, tmp_path: Path) -> None:
    for config, shown in (
        (SOUND | {key: value}, key),
        ({"hidden_size": None, "text_config": SOUND | {key: value}}, f"text_config.{key}"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError) as caught:
            model_files.check(tmp_path, NAMES)
        written = json.dumps(value) if not isinstance(value, str) else repr(value)
        line = f"{tmp_path / 'config.json'}: {shown}={written} {SIZE}"
        assert str(caught.value).startswith(line)
        model_files.check(tmp_path, NAMES, overridden={key})


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers"])
def test_sizes_that_every_model_has(key: str, tmp_path: Path) -> None:
    for value in (None, 0, [], [None]):
        (tmp_path / "config.json").write_text(json.dumps(SOUND | {key: value}))
        refused(tmp_path, "config.json", f"{key}={json.dumps(value)} {SIZE} 1 to ")


@pytest.mark.parametrize(
    ("key", "wanted"),
    [
        ("architectures", "a list of names"),
        ("model_type", "a name"),
        ("quantization_config", "an object"),
    ],
)
def test_values_of_another_kind(key: str, wanted: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SOUND | {key: 3}))
    refused(tmp_path, "config.json", f"{key}=3 is not allowed: {wanted} is wanted")
    (tmp_path / "config.json").write_text(json.dumps(SOUND | {key: None}))
    model_files.check(tmp_path, NAMES)

    (tmp_path / "config.json").write_text(json.dumps(SOUND | {"architectures": ["A", None]}))
    refused(tmp_path, "config.json", 'architectures=["A", null] is not allowed: a list of names')


NAMED = "is not allowed: the name of a format is wanted"
BY_MODELOPT = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}


@pytest.mark.parametrize(
    ("section", "fault"),
    [
        ({"quant_method": 3}, f".quant_method=3 {NAMED}"),
        ({"quant_method": ["fp8"]}, f'.quant_method=["fp8"] {NAMED}'),
        ({"quant_method": None}, f".quant_method=null {NAMED}"),
        ({"quant_method": ""}, f".quant_method='' {NAMED}"),
        ({"bits": 4}, " has no quant_method: the name of a format is wanted"),
        (BY_MODELOPT | {"producer": 3}, ".producer=3 is not allowed: an object is wanted"),
        (BY_MODELOPT | {"quantization": [1]}, ".quantization=[1] is not allowed: an object"),
    ],
)
def test_sections_without_a_format(section: Any, fault: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    for key in model_files.SECTIONS:
        file.write_text(json.dumps(SOUND | {key: section}))
        refused(tmp_path, "config.json", f"{key}{fault}")
        model_files.check(tmp_path, NAMES, overridden={key})
        file.write_text(json.dumps(SOUND | {"text_config": SOUND | {key: section}}))
        refused(tmp_path, "config.json", f"text_config.{key}{fault}")


@pytest.mark.parametrize("section", [None, {}, {"quant_method": "any"}, BY_MODELOPT])
def test_sections_that_are_left_to_vllm(section: Any, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(SOUND | {"quantization_config": section}))
    model_files.check(tmp_path, NAMES)


GOOD = (
    "{% for m in messages %}{% generation %}{{ m | tojson }}{% endgeneration %}"
    "{% break %}{% endfor %}{{ strftime_now('%Y') }}"
)
BAD = {
    "{{ x": "is no valid Jinja: line 1: unexpected end of template",
    "\n{% for m in messages %}": "is no valid Jinja: line 2: Unexpected end of template",
    "{{ x | unheard_of }}": "is no valid Jinja: line 1: No filter named 'unheard_of'",
    "{{ " + "(" * 5000: "is no valid Jinja: maximum recursion depth exceeded",
}


@pytest.mark.parametrize("template", BAD)
def test_chat_templates_that_are_no_jinja(template: str, tmp_path: Path) -> None:
    fault = BAD[template]
    jinja = tmp_path / "chat_template.jinja"
    jinja.write_text(template)
    refused(tmp_path, jinja.name, fault)
    jinja.unlink()
    for name in ("tokenizer_config.json", "chat_template.json"):
        listed = [{"name": "default", "template": GOOD}, {"name": "tools", "template": template}]
        for written in (template, listed, {"default": template}):
            (tmp_path / name).write_text(json.dumps({"chat_template": written}))
            refused(tmp_path, name, f"chat_template {fault}")
        (tmp_path / name).unlink()


def test_chat_templates_that_are_sound_or_not_used(tmp_path: Path) -> None:
    for written in (None, GOOD, [{"name": "default", "template": GOOD}]):
        (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": written}))
        model_files.check(tmp_path, NAMES)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{"}))
    refused(tmp_path, "tokenizer_config.json", "is no valid Jinja")
    (tmp_path / "chat_template.jinja").write_text(GOOD)
    model_files.check(tmp_path, NAMES)


@pytest.mark.parametrize("written", [3, [3], [{"name": "default"}], [{"template": "x"}], {"a": 1}])
def test_chat_templates_of_another_kind(written: Any, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": written}))
    refused(
        tmp_path, "tokenizer_config.json", f"chat_template={json.dumps(written)} is not allowed"
    )


def test_long_values_are_cut(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"num_experts": "9" * 10_000}))
    with pytest.raises(CheckpointError) as caught:
        model_files.check(tmp_path, NAMES)
    assert len(str(caught.value).removeprefix(str(tmp_path))) < 400
    (tmp_path / "config.json").write_text('{"num_experts": ' + "9" * 100_000 + "}")
    refused(tmp_path, "config.json", "is no JSON: Exceeds the limit")
