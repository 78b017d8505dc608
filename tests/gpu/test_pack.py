"""Tests how vLLM is packed for a machine without a network, on a small wheel that is made up."""

import json
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.gpu.on_device import pack

METADATA = """\
Metadata-Version: 2.4
Name: vllm
Requires-Dist: torch==2.13.0
Requires-Dist: Numba_Stub>=1
Requires-Dist: numpy
Requires-Dist: tilelang==0.1
Requires-Dist: old-one; python_version < "3.10"
Requires-Dist: aside; extra == "audio"
"""


@pytest.mark.parametrize(
    "entries",
    [
        "[console_scripts]\nvllm = vllm.main:main\n",
        "[vllm.general_plugins]\nother = other:register\n\n"
        "[console_scripts]\nvllm = vllm.main:main\n",
    ],
)
def test_a_wheel_is_unpacked_with_our_plugin_and_without_kernels(
    entries: str, tmp_path: Path
) -> None:
    info, wheel, site = "vllm-0.1.dist-info", tmp_path / "vllm.whl", tmp_path / "site"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("vllm/__init__.py", "vllm/_C.abi3.so", *pack.LEFT_OUT):
            archive.writestr(f"{name}_C.so" if name.endswith(("/", "fa2")) else name, "x")
        archive.writestr(f"{info}/entry_points.txt", entries)
        archive.writestr(f"{info}/METADATA", METADATA)
    assert pack.unpack_vllm(wheel, site) == METADATA
    files = sorted(str(file.relative_to(site)) for file in site.rglob("*") if file.is_file())
    assert files == [
        f"{info}/METADATA",
        f"{info}/entry_points.txt",
        "vllm/_C.abi3.so",
        "vllm/__init__.py",
    ]
    text = (site / info / "entry_points.txt").read_text()
    plugins = text.partition("[vllm.general_plugins]\n")[2].partition("\n\n")[0].splitlines()
    assert plugins[0] == "lvllm = lvllm.plugin:register"
    assert (plugins[1:] == ["other = other:register"]) == ("other" in entries)
    assert "vllm = vllm.main:main\n" in text


def test_what_is_needed_and_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """pip says which versions; what needs CUDA's own packages is on the machine."""
    asked: list[str] = []

    def run(command: list[str], **_: Any) -> None:
        assert "--dry-run" in command
        asked.extend(word for word in command if word[0] not in "-/")
        found = ("Numba_Stub", "typer", "numpy", "torch", "nvidia-nccl-cu13", "new-one", "tilelang")
        install = [{"metadata": {"name": name, "version": "2"}} for name in found]
        Path(command[-1]).write_text(json.dumps({"install": install}))

    monkeypatch.chdir(Path(__file__).parents[2])
    monkeypatch.setattr(pack, "subprocess", SimpleNamespace(run=run))
    installed = {"numpy", "torch", "triton"}
    needed = pack.needed(METADATA, installed, "3.12")
    assert needed == ["Numba_Stub==2", "typer==2", "new-one==2"]
    assert "Numba_Stub>=1" in asked
    assert any(word.startswith("typer") for word in asked)
    assert not {"numpy", "torch==2.13.0", "tilelang==0.1", "old-one", "aside"} & set(asked)
