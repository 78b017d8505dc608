"""Tests the file of an earlier server's counts."""

import resource
from pathlib import Path

import pytest
import torch

from lvllm.gpu.cache import placement, saved
from tests.random_layers import Random


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path, scores = tmp_path / "new" / "reads", Random(3).uniform(0, 9, 2, 7)
    assert saved.read(path, [3, 4], 7) is None
    saved.write(path, [3, 4], scores)
    found = saved.read(path, [3, 4], 7)
    assert found is not None
    assert torch.equal(found, scores)
    for layers, experts in (([3, 5], 7), ([3], 8), ([3, 4], 6)):
        assert saved.read(path, layers, experts) is None


@pytest.mark.parametrize("damage", [b"", b"\xff" * 100, b"{}"])
def test_a_damaged_file_counts_as_none(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "reads"
    path.write_bytes(damage)
    assert saved.read(path, [1], 4) is None
    saved.write(path, [1], torch.full((1, 4), float("nan")))
    assert saved.read(path, [1], 4) is None


def test_a_place_that_cannot_be_written_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    saved.write(tmp_path / "file" / "reads", [1], torch.zeros(1, 4))
    assert "how often experts are read cannot be saved" in caplog.text


def test_a_full_disk_keeps_the_file_before_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "reads"
    saved.write(path, [1], torch.ones(1, 4))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The kernel then writes the first 64 bytes and refuses the others, as on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    try:
        saved.write(path, [1], torch.zeros(1, 4000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "cannot be saved" in caplog.text
    assert list(tmp_path.iterdir()) == [path]
    found = saved.read(path, [1], 4)
    assert found is not None
    assert torch.equal(found, torch.ones(1, 4))


def test_counts_are_float32_whatever_a_model_is(tmp_path: Path) -> None:
    """vLLM makes the model's dtype the default one while it loads, and a cache may open then."""
    path, before = tmp_path / "reads", torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        chosen = placement.Placement(2, 5, 3)
    finally:
        torch.set_default_dtype(before)
    chosen.count(torch.full((2, 5), 257.0), 0)
    saved.write(path, [0, 1], chosen.scores)
    found = saved.read(path, [0, 1], 5)
    assert found is not None
    assert found.tolist() == [[257.0] * 5] * 2
