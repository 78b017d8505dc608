"""Folders for logs: kept with logs, and gone without."""

import tempfile
from pathlib import Path

import pytest

from lvllm.bench.logs import log_folder


def test_only_logs_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with log_folder("refused-"):
        pass
    with log_folder("silent-") as logs:
        (logs / "load.log").touch()
    with log_folder("served-") as logs:
        (logs / "1.log").write_text("a line")
        (logs / "load.log").touch()
    assert [path.name for path in tmp_path.iterdir()] == [logs.name]
    assert [path.name for path in logs.iterdir()] == ["1.log"]


def test_failures_keep_their_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def fail(log: str) -> None:
        with log_folder("failed-") as logs:
            (logs / "1.log").write_text(log)
            raise KeyError

    for log in ("", "a line"):
        with pytest.raises(KeyError):
            fail(log)
    assert len([*tmp_path.iterdir()]) == 1
