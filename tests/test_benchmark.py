"""benchmarks/moe_block.py as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "moe_block.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={"PYTHONPATH": str(SCRIPT.parent.parent), "PATH": ""},
    )


def test_json(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    got = run(
        *("--shape", "33x47x3x2", "--shape", "tiny", "--tokens", "1,70"),
        *("--threads", "1", "--format", "fp16", "--json", str(report)),
    )
    assert got.returncode == 0, got.stderr
    content = json.loads(report.read_text())
    assert content["machine"]["threads"] == 1
    assert content["machine"]["read_gb_s"] > 0
    results = content["results"]
    assert [(r["shape"], r["tokens"]) for r in results] == [
        ("33x47x3x2", 1),
        ("33x47x3x2", 70),
        ("64x32x4x2", 1),
        ("64x32x4x2", 70),
    ]
    for result in results:
        assert set(result) == {
            *("shape", "format", "tokens", "threads", "ms", "gb_s", "gflop_s"),
            *("roofline", "error"),
        }
        assert result["format"] == "fp16"
        assert 0 < result["error"] < 1e-3
        assert min(result["ms"], result["gb_s"], result["gflop_s"], result["roofline"]) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "10x10x2"], "--shape is '10x10x2', must be HxIxExK"),
        (["--shape", "10x10x2x3"], "top-3 of 2 experts"),
        (["--shape", "10x0x2x1"], "at least 1"),
        (["--shape", "100000x100000x1000x1"], "GiB are free"),
        (["--format", "int4"], "--format is 'int4', must be one of bf16, fp16"),
        (["--tokens", "1,x"], "--tokens is '1,x'"),
        (["--threads", "9999"], "--threads: threads is 9999, must be 1 to"),
        (["--json", "/no/such/folder/x.json"], "there is no folder /no/such/folder"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str) -> None:
    got = run(*arguments)
    assert got.returncode == 1
    assert message in " ".join(got.stderr.split())
    assert "Traceback" not in got.stderr
