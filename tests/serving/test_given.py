"""What arguments, files and the environment give."""

from pathlib import Path

import pytest

from lvllm.serving.given import count, read
from lvllm.settings.variables import SettingError


@pytest.mark.parametrize(
    ("words", "model", "options"),
    [
        ([], None, {}),
        (["folder"], "folder", {}),
        (["--port", "1"], None, {"port": "1"}),
        (
            ["m", "--max-model-len=8k", "-tp", "2"],
            "m",
            {"max-model-len": "8k", "tensor-parallel-size": "2"},
        ),
        (["m", "--max_model_len", "10"], "m", {"max-model-len": "10"}),
        (["m", "--a_b.c_d", "10"], "m", {"a-b.c_d": "10"}),
        (
            ["--model", "m", "--enforce-eager", "--seed", "-1"],
            "m",
            {"enforce-eager": True, "seed": "-1"},
        ),
        (["m", "--port", "1", "--port", "2"], "m", {"port": "2"}),
    ],
)
def test_words(words: list[str], model: str | None, options: dict[str, object]) -> None:
    given = read(words, {})
    assert given.model == model
    assert {key: given.options.get(key) for key in options} == options
    assert given.lvllm == frozenset()


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("model: of-file\nmax_model_len: 100\nport: 1\n")
    given = read(["--config", str(file), "--port", "2"], {})
    assert given.model == "of-file"
    assert (given.options["max-model-len"], given.options["port"]) == (100, "2")
    assert read(["of-words", "--config", str(file)], {}).model == "of-words"


@pytest.mark.parametrize(
    "words",
    [
        ["--additional-config", '{"lvllm": {"moe_use_weight": "INT4"}}'],
        ["--additional-config", '{"lvllm": {"moe_use_weight": [{".*": "INT4"}]}}'],
        ["--additional_config.lvllm.moe_use_weight=INT4"],
        ["--additional-config.lvllm.moe_use_weight", "INT4"],
    ],
)
def test_settings_of_lvllm_are_found_wherever_they_are(words: list[str], tmp_path: Path) -> None:
    assert read(words, {}).lvllm == {"moe_use_weight"}
    file = tmp_path / "config.yaml"
    file.write_text("additional_config.lvllm.lk_threads: 2\n")
    environ = {"LVLLM_DENSE_WEIGHT": "INT8", "LK_THREAD_BINDING": ""}
    found = read([*words, "--config", str(file)], environ).lvllm
    assert found == {"moe_use_weight", "lk_threads", "dense_weight"}


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(SettingError, match="--config /no/file: No such file or directory"):
        read(["--config", "/no/file"], {})


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (4096, 4096),
        ("8k", 8000),
        ("8K", 8192),
        ("1.5k", 1500),
        ("auto", None),
        (None, None),
        ("-1", None),
        ("k", None),
        ("infk", None),
    ],
)
def test_numbers_of_tokens(value: object, number: int | None) -> None:
    assert count(value) == number
