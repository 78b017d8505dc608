"""One copy of the weights: the peak resident memory of loading and running a model of 2 GiB."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.loading import make
from lvllm.checkpoint.gguf.tensors import checkpoint_of
from lvllm.machine.memory_need import needed
from tests.e2e.generate import DEFAULTS, ONE_PROCESS, call
from tests.models.gguf import large

GIB = 1 << 30


def peak() -> int:
    """Bytes that this process had in memory at most, the modules it was forked with among them.

    Not from getrusage: its peak begins with that of the process that started this one.
    """
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def run(model: str, result: str) -> None:
    """In a forked process: load the model, compute two tokens, write the peak to `result`."""
    from vllm import LLM, SamplingParams

    llm = LLM(**{**DEFAULTS, "model": model})
    llm.generate([{"prompt_token_ids": [5, 6, 7]}], SamplingParams(max_tokens=2, detokenize=False))
    Path(result).write_text(str(peak()))


@pytest.mark.parametrize("experts", ["bf16", "fp8"])
def test_peak_is_the_weights_and_small_change(experts: str, tmp_path: Path) -> None:
    """All weights are in one file, which alone is more than what the peak may exceed them by."""
    make(tmp_path, int(2.2 * GIB), shard=1 << 60, experts=experts)
    (file,) = tmp_path.glob("*.safetensors")
    weights = file.stat().st_size
    assert weights >= 2 * GIB
    result = tmp_path / "peak"
    with (tmp_path / "log").open("w") as log:
        call(run, str(tmp_path), str(result), log=log, environment=ONE_PROCESS)
    said = (tmp_path / "log").read_text()
    assert "LvLLM: experts on lk" in said
    seen = int(result.read_text())
    print(json.dumps({"weights_gib": weights / GIB, "peak_gib": seen / GIB}))
    assert re.search(r"LvLLM: read \d", said)
    assert seen <= weights + 1.5 * GIB


def test_peak_of_a_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts take what they take in the file, and all other weights 16 bits each."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = large(tmp_path / "model.gguf", layers=4)
    need = needed(checkpoint_of(file).tensors, None, layers=4, section={"quant_method": "gguf"})
    assert need.experts >= 2 * GIB
    result = tmp_path / "peak"
    with (tmp_path / "log").open("w") as log:
        call(run, str(file), str(result), log=log, environment=ONE_PROCESS)
    assert "LvLLM: experts on lk" in (tmp_path / "log").read_text()
    seen = int(result.read_text())
    sizes = {"file": file.stat().st_size, "weights": need.total, "peak": seen}
    print(json.dumps({name: size / GIB for name, size in sizes.items()}))
    assert seen <= need.total + 1.5 * GIB
