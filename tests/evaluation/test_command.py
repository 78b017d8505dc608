"""`lvllm eval` refuses what it cannot do in one line, before it starts a model."""

import json
from pathlib import Path

import numpy as np
import pytest

from lvllm.evaluation import passages, reference, report
from lvllm.evaluation.likelihood import Comparison, Likelihoods
from lvllm.evaluation.models import LocalModel, expert_bytes
from lvllm.evaluation.report import Row, markdown, split_page, write_page
from lvllm.evaluation.scoring import Result, Tally
from tests.cli.test_cli import invoke
from tests.e2e.generate import TINY

REFERENCE = "reference.npz"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files to name: a text of some 60 windows, a saved reference of it, and broken files."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "text.txt").write_text("What is 47 + 38? " * 40)
    (folder / "other.txt").write_text("What is 47 + 39? " * 40)
    (folder / "short.txt").write_text("What?")
    (folder / "empty.txt").write_text("")
    (folder / "page.md").write_text("no markers")
    read = passages.of_text(folder / "text.txt", LocalModel(str(TINY), "", "").tokenizer(), 32, 16)
    values = np.zeros((read.scored, 3), np.float32)
    for name, vocabulary in ((REFERENCE, 445), ("larger.npz", 446)):
        listed = Likelihoods(values[:, 0], values.astype(np.int32), values, vocabulary)
        reference.save(folder / name, reference.ReferenceRun("model", read, listed))
    for name, changes in (
        ("quantised", {"quantization_config": {"quant_method": "awq"}}),
        ("larger", {"vocab_size": 446}),
        ("wide", {"vocab_size": 200000}),
    ):
        (folder / name).mkdir()
        config = json.loads((TINY / "config.json").read_text()) | changes
        (folder / name / "config.json").write_text(json.dumps(config))
        for file in TINY.glob("tokenizer*"):
            (folder / name / file.name).write_bytes(file.read_bytes())
    (folder / "untold").mkdir()
    (folder / "untold" / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("TINY --text missing.txt", "missing.txt"),
        ("TINY --text empty.txt", "empty.txt holds no text"),
        ("TINY --text short.txt", "short.txt has 2 tokens, fewer than one window of 512"),
        ("TINY --text text.txt --context 32 --stride 40", "--stride 40 with --context 32"),
        ("TINY --text text.txt --context 32 --reference missing", "'missing' is no checkpoint"),
        ("TINY --text text.txt --context 32 --reference page.md", "page.md is no reference saved"),
        ("TINY --text text.txt --context 32 --reference .", "it has no config.json"),
        (
            "TINY --text text.txt --context 32 --stride 8 --reference reference.npz",
            "reference.npz was made with windows of 32 tokens, every 16; this run has windows of 32"
            " tokens, every 8",
        ),
        (
            "TINY --text other.txt --context 32 --stride 16 --reference reference.npz",
            "reference.npz was made of another text: text.txt in windows",
        ),
        ("TINY --reference reference.npz", "this run has chats, the answers scored"),
        (
            "TINY --text text.txt --context 32 --stride 16 --reference larger.npz",
            "the reference has a vocabulary of 446 tokens, the model one of 445",
        ),
        (
            "TINY --text text.txt --context 32 --reference larger",
            "the reference has a vocabulary of 446 tokens, the model one of 445",
        ),
        ("TINY --reference reference.npz --top 3", "a saved reference has its own"),
        ("TINY --reference untold", "untold: its tokenizer does not load"),
        ("TINY --save page.md", "--save page.md: exists already"),
        ("TINY --save missing/run.npz", "missing is no folder"),
        ("TINY --save run.npz --reference TINY", "leave --reference out"),
        ("TINY --top 0 --save run.npz", "--top 0 is not allowed: at least 1"),
        (
            "wide --text text.txt --context 512 --top 99999 --save run.npz",
            "--top 99999: of passages of 512 tokens vLLM can list the 32768 most probable",
        ),
        ("TINY --formats int3", "--formats 'int3' is not allowed: all, or bf16, fp16, fp8, int8"),
        ("TINY --formats all --save run.npz", "leave --save out"),
        ("TINY --formats all --dtype float32", "--dtype 'float32' is not allowed: bfloat16 or"),
        ("quantised --formats all", "quantised is quantised already (awq)"),
        ("missing --formats all", "'missing' is no checkpoint folder"),
        ("TINY --formats all --markdown page.md", "page.md has no lines <!-- lvllm eval: begin"),
        ("TINY --formats all --markdown missing/page.md", "missing is no folder"),
        (
            "TINY --formats all --markdown new.md --markdown page.md",
            "page.md has no lines <!-- lvllm eval: begin",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, message: str
) -> None:
    monkeypatch.chdir(folder)
    code, output = invoke("eval", *arguments.replace("TINY", str(TINY)).split())
    assert code == 1
    assert output.startswith("lvllm: ")
    assert message in output
    assert len(output.strip().splitlines()) == 1


def test_a_context_beyond_the_model_is_refused(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "long.txt"
    text.write_text("7" * 3000)
    code, output = invoke("eval", str(TINY), "--text", str(text), "--context", "1024")
    assert code == 1
    assert "takes 1024 tokens, and a passage has 1024, after which one more" in output
    assert len(output.strip().splitlines()) == 1


def rows() -> list[Row]:
    values = np.full((4, 2), -0.5, np.float32)
    likelihoods = Likelihoods(values[:, 0], values.astype(np.int32), values, 9)
    result = Result({"add": Tally(3, 4)}, ())
    return [
        Row("bf16", 3 << 20, result, likelihoods),
        Row(
            "int4", 5 << 30, result, likelihoods, Comparison(0.75, np.array([0.001]), False, 2, 0.9)
        ),
    ]


def test_the_table_and_what_it_says_of_itself() -> None:
    about = report.notes(rows(), "a text", "bf16")
    assert markdown(rows(), about).splitlines() == [
        "| model | experts | exact match | NLL | perplexity | same top-1 | KL divergence |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| bf16 | 3.00 MiB | 75.0% | 0.5000 | 1.649 |  |  |",
        "| int4 | 5.00 GiB | 75.0% | 0.5000 | 1.649 | 75.00% | 0.001000 |",
        "",
        "NLL in nats a token, over 4 tokens of a text.",
        "KL divergence from bf16 in nats a token: from the 2 most probable tokens of each model,"
        " which have 90.00% of the probability, and all others as one: a lower bound.",
    ]
    assert markdown([Row("x", likelihoods=rows()[0].likelihoods)], []).startswith(
        "| model | NLL | perplexity |\n"
    )


def test_a_page_keeps_what_is_around_the_table(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    write_page(page, "first")
    assert page.read_text() == f"{report.BEGIN}\nfirst\n{report.END}\n"
    page.write_text(f"before\n{page.read_text()}after\n")
    write_page(page, "second")
    assert page.read_text() == f"before\n{report.BEGIN}\nsecond\n{report.END}\nafter\n"
    assert split_page(page) == ("before\n", "\nafter\n")


def test_the_experts_bytes_are_those_of_the_file() -> None:
    # 4 layers, 16 experts, three matrices of 128 x 128, 2 bytes for each weight.
    assert expert_bytes(TINY) == 4 * 16 * 3 * 128 * 128 * 2
