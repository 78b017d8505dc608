"""`lvllm eval` on the demo model: against transformers, and each format within its bound of bf16.

The bounds are those of docs/quality.md, whose table is this command's.
"""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lvllm.cli.app import app
from lvllm.evaluation import EvaluationError, reference, report
from lvllm.evaluation.likelihood import compare
from lvllm.evaluation.logprobs import logprobs_from_transformers
from lvllm.evaluation.models import FORMATS
from lvllm.evaluation.processes import run_in_new_process
from lvllm.evaluation.questions import TINY_MOE
from tests.e2e.generate import ROOT, TINY

PAGE = ROOT / "docs" / "quality.md"
# Points of exact match; one answer of the 500 is 0.2.
BOUNDS = {"fp8": 0.5, "int8": 0.5, "int4": 2.0, "mxfp4": 2.0, "nvfp4": 2.0}
# Nats. Seen are at most 0.00003 in 8 bits or more and 0.0005 in 4 bits.
DIVERGENCES = {"fp8": 0.0003, "int8": 0.0003, "int4": 0.003, "mxfp4": 0.003, "nvfp4": 0.003}


def evaluate(*arguments: str, enabled: str = "1") -> str:
    """The output of `lvllm eval ARGUMENTS`, wide enough for a line each."""
    environment = {"LVLLM_MOE_NUMA_ENABLED": enabled, "COLUMNS": "200"}
    result = CliRunner().invoke(app, ["eval", *arguments], env=environment)
    assert result.exit_code == 0, result.output
    return result.output


def table(page: str) -> dict[str, dict[str, str]]:
    """The cells of the markdown table by model and heading."""
    lines = page.partition(report.BEGIN)[2].partition(report.END)[0].splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    heads, _, *rows = cells
    return {row[0]: dict(zip(heads, row, strict=True)) for row in rows}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    page = tmp_path_factory.mktemp("docs") / "quality.md"
    page.write_text(PAGE.read_text())
    output = evaluate(str(TINY), "--formats", ",".join(BOUNDS), "--markdown", str(page))
    assert "KL divergence from bf16 in nats a token: exact" in output
    assert report.split_page(page) == report.split_page(PAGE)  # what is around the table stays
    print(page.read_text())
    return table(page.read_text())


def test_a_model_that_does_not_load_ends_in_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(TINY, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    result = CliRunner().invoke(app, ["eval", str(broken)])
    assert result.exit_code == 1
    assert result.output.startswith("lvllm: broken: ")
    assert len(result.output.splitlines()) == 1


def test_a_process_that_is_killed_is_noticed() -> None:
    with pytest.raises(EvaluationError, match=r"^x: its process was killed"):
        run_in_new_process("x", os._exit, 9)


def points(cells: dict[str, str]) -> float:
    return float(cells["exact match"].removesuffix("%"))


def test_every_format_is_in_the_table_and_on_the_page(measured: dict[str, dict[str, str]]) -> None:
    documented = table(PAGE.read_text())
    assert set(documented) == set(FORMATS)
    assert set(measured) == {"bf16", *BOUNDS}
    for name, cells in measured.items():
        assert cells.keys() == documented[name].keys()
        # The instruction set decides some near-ties.
        assert points(cells) == pytest.approx(points(documented[name]), abs=1.0)
        assert cells["experts"] == documented[name]["experts"]


@pytest.mark.parametrize("format", sorted(BOUNDS))
def test_a_format_is_as_good_as_bf16(format: str, measured: dict[str, dict[str, str]]) -> None:
    cells = measured[format]
    assert points(cells) >= points(measured["bf16"]) - BOUNDS[format] - 1e-9
    assert 0 < float(cells["KL divergence"]) <= DIVERGENCES[format]


def test_likelihoods_are_those_of_transformers(tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(TINY_MOE.read_text().splitlines(keepends=True)[::10]))
    file = tmp_path / "run.npz"
    arguments = [str(TINY), "--questions", str(questions)]
    output = evaluate(*arguments, "--save", str(file))
    kept = reference.load(file)
    assert f"over {kept.passages.scored} tokens of 50 chats, the answers scored" in output
    expected = logprobs_from_transformers(kept.passages, TINY, 1000, dtype="float32")
    found = compare(expected, kept.likelihoods)
    print(f"{kept.likelihoods.nll=} {expected.nll=} {found}")
    # Seen on all 500 questions: 4e-6 and 2.6e-5.
    assert abs(kept.likelihoods.nll - expected.nll) <= 5e-4
    assert found.exact
    assert 0 < found.divergence <= 2e-4
    assert found.agreement >= 0.99

    # Stock vLLM against the saved run, on lists of the 5 most probable tokens.
    short = tmp_path / "short.npz"
    listed = replace(
        kept.likelihoods,
        top_ids=kept.likelihoods.top_ids[:, :5],
        top_logprobs=kept.likelihoods.top_logprobs[:, :5],
    )
    reference.save(short, replace(kept, likelihoods=listed))
    output = evaluate(*arguments, "--reference", str(short), enabled="0")
    assert "from the 5 most probable tokens of each model, which have 99." in output
    assert "LvLLM" not in output
