"""`lvllm verify` on the demo model, sound and damaged."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

TINY = Path(__file__).parents[2] / "examples/models/tiny-moe"
COMMAND = "import sys; sys.argv[0] = 'lvllm'; from lvllm.cli import main; main()"


def verify(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", COMMAND, "verify", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_the_demo_model_is_sound() -> None:
    result = verify(str(TINY), "--json", LVLLM_MOE_USE_WEIGHT="INT4")
    assert result.returncode == 0, result.stderr
    reports = json.loads(result.stdout)
    assert [report["name"] for report in reports] == [
        f"model.layers.{i}.mlp.experts" for i in range(4)
    ]
    assert {report["format"] for report in reports} == {"int4"}
    assert all(one["error"] <= one["bound"] for report in reports for one in report["products"])


@pytest.mark.slow
def test_a_damaged_expert_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(TINY, folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.2.mlp.experts.13.down_proj.weight"
    tensors[name] = tensors[name] * 64
    tensors["model.layers.1.mlp.experts.3.up_proj.weight"][7, 8] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = 200  # a shorter context than that of any published model
    (folder / "config.json").write_text(json.dumps(config))
    result = verify(str(folder))
    assert result.returncode == 1
    lines = result.stdout.splitlines()
    assert "model.layers.1.mlp.experts: expert 3, w13: 1 weights are NaN" in lines
    said = "model.layers.2.mlp.experts: expert 13, w2: its weights are "
    assert any(line.startswith(said) for line in lines)
    assert lines[-1].startswith("2 of 4 layers are wrong: 4 layers on ")


def test_no_model() -> None:
    result = verify("/no/such/model")
    assert result.returncode == 1
    assert result.stdout == ""
    assert [
        line for line in result.stderr.splitlines() if line.startswith("lvllm: /no/such/model: ")
    ]
    assert "Traceback" not in result.stderr
