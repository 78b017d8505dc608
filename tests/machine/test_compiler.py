from pathlib import Path

import pytest

from lvllm.machine import compiler


def test_a_compiler_and_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "g++"
    program.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(compiler.sysconfig, "get_path", lambda name: str(tmp_path / name))
    assert str(compiler.lacking()).startswith(f"{tmp_path}/include has no Python.h (Debian")
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "Python.h").touch()
    assert compiler.lacking() is None
    monkeypatch.setenv("CXX", "other-g++")
    assert "no C++ compiler (other-g++; Debian" in str(compiler.lacking())
    program.rename(tmp_path / "other-g++")
    assert compiler.lacking() is None
