"""`lvllm eval` on the demo model, compared with transformers, and each format compared with bf16.

The bounds are those of docs/quality.md. The same command wrote the table on that page.
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
# So many points of exact match a format may lose. One answer of the 500 is 0.2 points.
BOUNDS = {"fp8": 0.5, "int8": 0.5, "int4": 2.0, "mxfp4": 2.0, "nvfp4": 2.0}
# These are in nats. The divergences that were seen are at most 0.00003 in 8 bits or more, and at
# most 0.0005 in 4 bits.
DIVERGENCES = {"fp8": 0.0003, "int8": 0.0003, "int4": 0.003, "mxfp4": 0.003, "nvfp4": 0.003}


def evaluate(*arguments: str, enabled: str = "1") -> str:
    """Run `lvllm eval ARGUMENTS`; return its output, which is wide enough not to wrap its lines."""
    environment = {"LVLLM_MOE_NUMA_ENABLED": enabled, "COLUMNS": "200"}
    result = CliRunner().invoke(app, ["eval", *arguments], env=environment)
    assert result.exit_code == 0, result.output
    return result.output


def table(page: str) -> dict[str, dict[str, str]]:
    """The cells of the page's markdown table, by model and by heading."""
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
    assert report.split_page(page) == report.split_page(PAGE)  # the text around stays
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
        # The instruction set of the CPU decides some near-ties, so the two may differ by a point.
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
    # On all 500 questions, a difference of 4e-6 and a divergence of 2.6e-5 were seen.
    assert abs(kept.likelihoods.nll - expected.nll) <= 5e-4
    assert found.exact
    assert 0 < found.divergence <= 2e-4
    assert found.agreement >= 0.99

    # Stock vLLM is compared with the saved run, on lists of the 5 most probable tokens.
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
