"""The `lvllm` command, as far as it starts no model."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from lvllm.cli.app import COMMANDS, app
from lvllm.settings.variables import VARIABLES

REPOSITORY = Path(__file__).parents[2]


def invoke(*arguments: str, **environment: str) -> tuple[int, str]:
    """Run `lvllm ARGUMENTS`. Returns its exit code and its output."""
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "100", **environment})
    return result.exit_code, result.output


def rows(output: str) -> dict[str, list[str]]:
    """The rows of the printed table by their first cell."""
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines()]
    return {row[0]: row[1:] for row in cells if len(row) == 3}


def test_help_lists_every_command_and_an_unknown_one_is_corrected() -> None:
    code, output = invoke("--help")
    assert code == 0
    assert {line.split()[1] for line in output.splitlines() if "│" in line} >= set(COMMANDS)
    code, output = invoke("exprt")
    assert code == 2
    assert "No such command 'exprt'. Did you mean 'export'" in output


def test_env_tells_every_value_and_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    code, output = invoke(
        "env", "--config", str(REPOSITORY / "config.yaml"), LK_THREADS="1", LK_ISA="portable"
    )
    assert code == 0, output
    table = rows(output)
    assert set(table) == {variable.name for variable in VARIABLES}
    assert table["LK_THREADS"] == ["1", "environment"]
    assert table["OMP_NUM_THREADS"] == ["1", "default"]
    assert table["LK_THREAD_BINDING"] == ["CPU_CORE", "config"]


@pytest.mark.parametrize("written", ["additional_config.lvllm.lk_threads: 1", "nested"])
def test_env_reads_dotted_and_nested_keys(tmp_path: Path, written: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        "additional_config:\n  lvllm:\n    lk_threads: 1\n" if written == "nested" else written
    )
    code, output = invoke("env", "--config", str(file))
    assert code == 0, output
    assert rows(output)["LK_THREADS"] == ["1", "config"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory"),
        ("a: [", "not YAML"),
        ("- a", "a mapping of settings is wanted"),
        ("additional_config.lvllm.lk_thread: 1", "did you mean lk_threads?"),
        ("tensor-parallel-size: none", "tensor-parallel-size='none' is not allowed"),
        ("tensor-parallel-size: true", "tensor-parallel-size=true is not allowed: a whole number"),
        ("data_parallel_size: 99999999999999999999", "is not allowed: a whole number from 1 to 65"),
    ],
)
def test_env_refuses_a_bad_file_in_one_line(
    tmp_path: Path, content: str | None, message: str
) -> None:
    file = tmp_path / "config.yaml"
    if content is not None:
        file.write_text(content)
    code, output = invoke("env", "--config", str(file))
    assert code == 1
    assert output.startswith("lvllm: ")
    assert message in output
    assert len(output.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a MODEL folder"),
        (["missing"], "'missing' is no checkpoint folder"),
        (["--server", "http://127.0.0.1:9/v1"], "no server answers at http://127.0.0.1:9/v1"),
        (["x", "--questions", "missing.jsonl"], "missing.jsonl"),
    ],
)
def test_eval_refuses_in_one_line(arguments: list[str], message: str) -> None:
    code, output = invoke("eval", *arguments)
    assert code == 1
    assert output.startswith("lvllm: ")
    assert message in output
    assert len(output.strip().splitlines()) == 1
