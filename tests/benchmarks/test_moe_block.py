"""benchmarks/moe_block.py, run as a user runs it, and the processes that it times."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import typer

from benchmarks.cases import Shape, UserError, batch, routing
from benchmarks.measure import Rates, Result
from benchmarks.moe_block import layers_for, main, parse_list, parse_pythons
from benchmarks.peers.protocol import Died, Peer
from benchmarks.peers.settings import Refused, Settings
from benchmarks.report import BEGIN, END, Report, markdown, write_markdown
from benchmarks.weights import FORMATS, RandomWeights, layer_bytes, relative_error
from lvllm.engine.weight_formats import ALL_FORMATS

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "moe_block.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={"PYTHONPATH": str(SCRIPT.parent.parent), "PATH": ""},
    )


def state(pid: int) -> str:
    """The letter that the kernel shows for a process's state. T means stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.fixture(scope="module")
def torch_peer() -> Iterator[Peer]:
    with Peer("torch_experts", sys.executable, Settings(1)) as peer:
        yield peer


@pytest.mark.slow
def test_reports(tmp_path: Path) -> None:
    report, plot, table, twin = (tmp_path / name for name in ("r.json", "r.png", "r.md", "r.zh.md"))
    arguments = [
        *("--shape", "64x96x3x2", "--shape", "tiny", "--shape", "100000x100000x1000x1"),
        *("--tokens", "1,70", "--seconds", "0"),
        *("--threads", "1", "--format", "fp16,int8", "--peer", "torch", "--json", str(report)),
        *("--markdown", str(table), "--markdown", str(twin), "--plot", str(plot)),
    ]
    got = run(*arguments)
    assert got.returncode == 0, got.stderr
    # What does not fit into memory is left out, and the rest is kept.
    for format in ("fp16", "int8"):
        assert f"100000x100000x1000x1 in {format} is left out: --shape" in got.stderr
    content = json.loads(report.read_text())
    assert content["machine"]["threads"] == 1
    assert content["machine"]["read_gb_s"] > 0
    assert content["engines"]["torch"] == str(torch.__version__)
    results = content["results"]
    assert [(r["shape"], r["format"], r["tokens"], r["engine"]) for r in results] == [
        (shape, format, tokens, engine)
        for shape in ("64x96x3x2", "64x32x4x2")
        for format, engines in (("fp16", ("lk", "torch")), ("int8", ("lk",)))
        for tokens in (1, 70)
        for engine in engines
    ]
    for result in results:
        assert set(result) == {
            *("shape", "format", "engine", "tokens", "threads", "ms", "gb_s", "gflop_s"),
            *("roofline", "error"),
        }
        assert 0 < result["error"] < (3e-3 if result["format"] == "fp16" else 1.5e-2)
        assert min(result["ms"], result["gb_s"], result["gflop_s"], result["roofline"]) > 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "| fp16 | torch |" in table.read_text() == twin.read_text()


@pytest.mark.slow
def test_call_cost() -> None:
    got = run("--call-cost", "--threads", "1")
    assert got.returncode == 0, got.stderr
    cost = json.loads(got.stdout)
    assert cost["busy_us"] > 0
    assert cost["busy_p99_us"] >= cost["busy_us"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "10x10x2"], "--shape is '10x10x2', must be HxIxExK"),
        (["--shape", "10x10x2x3"], "top-3 of 2 experts"),
        (["--shape", "10x0x2x1"], "at least 1"),
        (["--shape", "100000x100000x1000x1"], "GiB are free"),
        (["--format", "int5"], "--format is 'int5', must be one of bf16, fp16"),
        (["--format", "bf16", "--activation-bits", "4"], "--activation-bits is '4'"),
        (["--tokens", "1,x"], "--tokens is '1,x'"),
        (["--threads", "9999"], "--threads: threads is 9999, must be 1 to"),
        (["--peer", "oven"], "--peer is 'oven', must be one of torch, vllm-vec"),
        (["--peer-python", "lk=/bin/sh"], "must be NAME=PYTHON, NAME one of torch"),
        (["--json", "/no/such/folder/x.json"], "--json: there is no folder /no/such/folder"),
        (["--plot", "/no/such/folder/x.png"], "--plot: there is no folder /no/such/folder"),
        (
            ["--markdown", "x.md", "--markdown", "/no/such/folder/x.md"],
            "--markdown: there is no folder /no/such/folder",
        ),
    ],
)
def test_wrong_arguments(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["moe_block.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        typer.run(main)
    assert stopped.value.code == 1
    assert message in " ".join(capsys.readouterr().err.split())


def test_lists() -> None:
    assert parse_list("--format", ["bf16,int4", "int4 , fp8"], FORMATS) == ["bf16", "int4", "fp8"]
    assert parse_pythons([f"zentorch={sys.executable}"]) == {"zentorch": sys.executable}
    with pytest.raises(UserError, match="/no/such is no program"):
        parse_pythons(["zentorch=/no/such"])


def test_layers_leave_the_caches_or_fit_the_memory() -> None:
    assert layers_for(Shape(64, 32, 4, 2), "bf16", 1) > 2
    assert layers_for(Shape.parse("qwen3-30b-a3b"), "int4", 1) >= 1


def test_routing_is_the_same_everywhere() -> None:
    """The expected numbers are fixed: NumPy must draw the same experts in every interpreter."""
    ids, weights = routing(Shape(8, 8, 16, 3), 2, seed=5)
    assert ids.tolist() == [[2, 5, 13], [1, 0, 8]]
    assert np.allclose(weights.sum(axis=1), 1)


@pytest.mark.parametrize("format", FORMATS)
def test_weights_mean_what_they_should(format: str) -> None:
    """Outputs are near 1 with dequantised weights, and the roofline counts all their bytes."""
    # Rows of the other formats need not be a multiple of 256 weights, as a block is.
    shape = Shape(256, 512, 3, 2) if ALL_FORMATS[format].unit == 256 else Shape(192, 320, 3, 2)
    weights = RandomWeights(shape, format, 7)
    for name, columns in (("w13", shape.hidden), ("w2", shape.intermediate)):
        expert = weights.expert(name, 2)
        assert expert.shape == (*weights.patterns[name].shape[1:2], columns)
        assert torch.isfinite(expert).all()
        assert 0.5 < float(expert.std()) * columns**0.5 < 2
        tensor = weights.tensors()[name][2]
        assert torch.equal(
            tensor.view(torch.uint8), weights.patterns[name].expert(2).view(torch.uint8)
        )
    tensors = weights.tensors().values()
    assert layer_bytes(shape, format) == sum(tensor.nbytes for tensor in tensors)


def test_error_is_that_of_the_output() -> None:
    shape = Shape(32, 48, 5, 2)
    weights = RandomWeights(shape, "int4", 3)
    tokens = batch(shape, 9, 1, torch.bfloat16)
    wanted = torch.zeros(9, 32)
    for token in range(9):
        for expert, weight in zip(tokens.ids[token], tokens.weights[token], strict=True):
            h = weights.expert("w13", int(expert)) @ tokens.x[token].float()
            inner = torch.nn.functional.silu(h[:48]) * h[48:]
            wanted[token] += weight * (weights.expert("w2", int(expert)) @ inner)
    assert relative_error(weights, tokens, wanted) < 1e-5
    assert relative_error(weights, tokens, wanted * 1.25) == pytest.approx(0.25, rel=1e-4)


def test_peer_is_stopped_except_while_it_is_asked(torch_peer: Peer) -> None:
    with Peer("lk", sys.executable, Settings(1)) as lk:
        for peer in (torch_peer, lk):
            peer.introduce()
            peer.prepare(Shape(64, 32, 4, 2), "bf16", 2, 1)
        assert [state(peer.pid) for peer in (torch_peer, lk)] == ["T", "T"]
        # While one process runs, the other is stopped. Each is asked by hand, to look in between.
        os.kill(lk.pid, signal.SIGCONT)
        assert state(lk.pid) != "T"
        assert state(torch_peer.pid) == "T"
        error, once = lk.batches(5)
        assert error < 8e-3
        assert once > 0
        assert len(lk.time(3, 4)) == 4
        assert state(lk.pid) == "T"


def test_engine_refuses_and_goes_on(torch_peer: Peer) -> None:
    assert torch_peer.introduce() == (str(torch.__version__), ["bf16", "fp16"])
    with Peer("lk", sys.executable, Settings(1)) as lk:
        with pytest.raises(Refused, match="w13 has 66 rows"):
            lk.prepare(Shape(64, 33, 4, 2), "int4", 1, 1)
        lk.prepare(Shape(64, 32, 4, 2), "int8", 1, 1)
        # This layer is narrow, so little averages out: 2e-3 to 4e-3 where activations are bf16.
        assert lk.batches(3)[0] < 8e-3
        lk.release()


def test_missing_package_is_named() -> None:
    with (
        Peer("zentorch_experts", sys.executable, Settings(1)) as peer,
        pytest.raises(Refused, match=r"not installed: .* \(pip install zentorch\)"),
    ):
        peer.introduce()


def test_death_of_a_peer_is_told() -> None:
    with Peer("torch_experts", sys.executable, Settings(1)) as peer:
        os.kill(peer.pid, signal.SIGKILL)
        with pytest.raises(Died, match="signal SIGKILL"):
            peer.introduce()


def test_no_stopped_process_is_left_behind() -> None:
    """No process is left, not even if the benchmark is killed."""
    code = (
        "import os, sys\n"
        "from benchmarks.peers.protocol import Peer\n"
        "from benchmarks.peers.settings import Settings\n"
        "peer = Peer('torch_experts', sys.executable, Settings(1))\n"
        "peer.introduce()\n"
        "print(peer.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    pid = int(got.stdout)
    for _ in range(1200):  # a minute
        try:
            if state(pid) == "Z":
                return
        except (FileNotFoundError, ProcessLookupError):
            return
        signal.sigtimedwait([], 0.05)
    pytest.fail("the peer outlived its parent")


def report_of(milliseconds: dict[str, float]) -> Report:
    results = [
        Result("64x32x4x2", "bf16", engine, 1, 2, ms, 1.0, 1.0, 0.5, 1e-3)
        for engine, ms in milliseconds.items()
    ]
    machine = {"cpu": "a CPU", "isa": "avx2", "threads": 2}
    return Report(machine, {"lk": "1"}, results, Rates([1e9], [1e9]))


def test_markdown_marks_the_fastest() -> None:
    text = markdown(report_of({"lk": 0.5, "torch": 2.0}))
    assert "| bf16 | lk | **0.5 (50)** |" in text
    assert "| bf16 | torch | 2 (50) |" in text


def test_markdown_goes_between_its_markers(tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    report = report_of({"lk": 0.5})
    file.write_text("before\n")
    with pytest.raises(UserError, match="has no line"):
        write_markdown(report, file)
    file.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for _ in range(2):
        write_markdown(report, file)
        text = file.read_text()
        assert text.startswith(f"before\n{BEGIN}\n")
        assert text.endswith(f"{END}\nafter\n")
        assert "old" not in text
        assert text.count("| bf16 | lk |") == 1
