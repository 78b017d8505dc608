"""Tests the benchmarks of GPU offload, as far as they run without a GPU."""

import json
import sys
from pathlib import Path
from random import Random as Draw
from random import randrange

import pytest
import torch

from benchmarks import gpu_serving, gpu_timeline
from benchmarks.cases import Shape
from tests.random_layers import Random, random_layer


def test_the_timeline_of_a_pass() -> None:
    random = Random(randrange(1 << 30))
    layers = [random_layer(random, "int4", 4, 64, 64).make() for _ in range(3)]
    x = random.normal(40, 64).bfloat16()
    ids = random.integers(0, 4, 40, 2).int()
    times = gpu_timeline.of_host(layers, (x, ids, torch.ones(40, 2)), ahead=1)
    copied, computed = times["copy"], times["compute"]
    assert len(computed) == 3
    # The first layer is copied before it is computed. The third is copied after that has begun.
    assert copied[0][0] < computed[0][0] < copied[-1][1]
    assert gpu_timeline.draw(times).count("#") > 10


def test_what_a_trace_shows() -> None:
    events = [
        {"cat": "gpu_memcpy", "name": "Memcpy HtoD (Pinned -> Device)", "ts": 0, "dur": 1e4},
        {"cat": "gpu_memcpy", "name": "Memcpy HtoD (Pinned -> Device)", "ts": 1e4, "dur": 1e4},
        {"cat": "kernel", "name": "_down", "ts": 1e4, "dur": 4e3},
        {"cat": "kernel", "name": "gemm", "ts": 12e3, "dur": 4e3},
        {"cat": "kernel", "name": "gemm", "ts": 2e4, "dur": 6e3},
        {"cat": "gpu_memcpy", "name": "Memcpy DtoH (Device -> Pinned)", "ts": 0, "dur": 9e4},
        {"cat": "cpu_op", "name": "aten::copy_", "ts": 0, "dur": 9e4},
        {"name": "no category"},
    ]
    times = gpu_timeline.of_trace({"traceEvents": events})
    joined = gpu_timeline.busy(times["compute"])
    assert [end for span in joined for end in span] == pytest.approx([0.01, 0.016, 0.02, 0.026])
    copy, compute, summary = gpu_timeline.draw(times).splitlines()
    assert copy.endswith("| 20 ms")
    assert compute.endswith("| 12 ms")
    assert summary == "26 ms in all, 6 ms side by side: 50% of the shorter"
    del events[2:5]
    assert gpu_timeline.draw(gpu_timeline.of_trace({"traceEvents": events})) == (
        "nothing was seen of compute"
    )


def test_configurations_of_whole_runs(tmp_path: Path) -> None:
    shape = Shape.parse("qwen3-30b-a3b")
    gpu_serving.write_config(tmp_path, shape, 48, 151936, 40960)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (32, 4)
    found = gpu_serving.configurations(True, 48, 54.0, 2048, 1)
    assert len(found) == 9
    assert set(gpu_serving.OFFLOADED) <= found.keys()
    half = found["LvLLM, half layers resident"]["settings"]
    assert half["gpu_resident_moe_layers"] == "0-23"
    planned = [some["planned"] for some in found.values() if "planned" in some]
    assert planned == [54, 27, 0, 54]
    assert (
        found["LvLLM, half the experts in the cache"]["settings"]["gpu_expert_cache"] == "27.000000"
    )
    assert found["vLLM, half by cpu-offload-gb"]["cpu_offload_gb"] == 27
    assert len(gpu_serving.configurations(False, 48, 54.0, 2048, 1)) == 5


def test_a_table_of_whole_runs() -> None:
    draw = Draw(3)
    runs = {name: {"prefill 8": 100.0 * draw.random(), "decode 1": 10.0} for name in "abc"}
    results: dict[str, gpu_serving.Results | str] = {**runs, "d": "not here"}
    text = gpu_serving.report(results)
    assert text.splitlines()[1].count("(1.00)") == 2
    assert text.splitlines()[-1].split(maxsplit=1) == ["d", "not here"]
    results[gpu_serving.OFFLOADED[1]] = {"prefill 8": 50.0, "decode 1": 5.0}
    assert gpu_serving.report(results).splitlines()[1].endswith("10 (2.00)")
    assert gpu_serving.report({"a": "x"}) == "a: x"
    memory = {gpu_serving.HOST: 6.5, gpu_serving.PLANNED: 4.5}
    lines = gpu_serving.report({"a": {"decode 1": 10.0, **memory}}).splitlines()
    assert lines[1].split() == ["a", "10", "(1.00)"]
    assert lines[2].endswith("  host, GiB: 6.50, experts on the host by plan, GiB: 4.50")


def test_what_is_known_when_a_run_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each configuration is printed and kept as soon as it has been measured."""
    kept: list[tuple[dict[str, object], str]] = []
    file = tmp_path / "found.json"

    def measure(name: str, options: object, timeout: float) -> gpu_serving.Results:
        kept.append((json.loads(file.read_text()) if kept else {}, capsys.readouterr().out))
        if len(kept) == 3:
            raise KeyboardInterrupt
        return {"decode 1": float(len(kept))}

    monkeypatch.setattr(gpu_serving, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["", "--shape", "tiny", "--layers", "4", "--json", str(file)])
    with pytest.raises(KeyboardInterrupt):
        gpu_serving.main()
    (_, first), (one, second), (two, third) = kept
    assert not first
    assert second == "LvLLM, no layers resident: {'decode 1': 1.0}\n"
    assert third == "LvLLM, half layers resident: {'decode 1': 2.0}\n"
    assert (len(one), len(two)) == (1, 2)


def test_the_most_memory_of_a_process() -> None:
    assert 0.01 < gpu_serving.peak_gib() < 1000


@pytest.mark.parametrize(
    ("child", "says"),
    [
        ("import time; time.sleep(60)", "not done after 1 s (--timeout)"),
        ("print('ValueError: no such thing\\nand more'); exit(1)", "ValueError: no such thing"),
        ("print('found {\"decode 1\": 3.5}\\nlater')", {"decode 1": 3.5}),
    ],
)
def test_a_process_of_whole_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, child: str, says: object
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!{sys.executable}\n{child}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    assert gpu_serving.measure("a", {}, 1 if "sleep" in child else 60) == says
