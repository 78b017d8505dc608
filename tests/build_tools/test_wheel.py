"""The wheel of the plugin alone, as `make wheel` builds it."""

import os
import re
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection
from elftools.elf.sections import SymbolTableSection

from build_tools.record import digest
from build_tools.target import ROOT, lvllm_version

ENGINE = "lvllm/engine/_engine.so"
EPOCH = "SOURCE_DATE_EPOCH"
INFO = f"lvllm-{lvllm_version()}.dist-info"

pytestmark = pytest.mark.slow


def build(destination: Path, umask: int) -> Path:
    command = [sys.executable, "-m", "build_tools.wheel", "empty", "--dist", str(destination)]
    environment = {name: value for name, value in os.environ.items() if name != EPOCH}
    subprocess.run(
        command, cwd=ROOT, env=environment, check=True, umask=umask, stdout=subprocess.PIPE
    )
    (wheel,) = destination.iterdir()
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("dist"), umask=0o022)


@pytest.fixture(scope="module")
def files(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if name[-1] != "/"}


@pytest.fixture(scope="module")
def engine(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> ELFFile:
    with zipfile.ZipFile(wheel) as archive:
        return ELFFile(Path(archive.extract(ENGINE, tmp_path_factory.mktemp("engine"))).open("rb"))


def test_it_has_the_package_and_nothing_else(files: dict[str, bytes]) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "lvllm"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    sources = {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}
    assert {name for name in files if not name.startswith(INFO)} == sources | {ENGINE}


def test_metadata(files: dict[str, bytes]) -> None:
    assert files[f"{INFO}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    entry_points = files[f"{INFO}/entry_points.txt"].decode().split()
    assert " ".join(entry_points) == (
        "[console_scripts] lvllm = lvllm.cli:main"
        " [vllm.general_plugins] lvllm = lvllm.plugin:register"
    )
    metadata = Parser().parsestr(files[f"{INFO}/METADATA"].decode())
    assert (metadata["Name"], metadata["Version"]) == ("lvllm", lvllm_version())
    assert set(metadata["Requires-Python"].split(",")) == {">=3.11", "<3.15"}


def test_record(files: dict[str, bytes]) -> None:
    rows = [row.rsplit(",", 2) for row in files[f"{INFO}/RECORD"].decode().splitlines()]
    assert sorted(name for name, _, _ in rows) == sorted(files)
    for name, hashed, size in rows:
        if name != f"{INFO}/RECORD":
            assert (hashed, int(size)) == (digest(files[name]), len(files[name])), name


def test_the_tag_is_of_the_oldest_systems_that_run_it(
    wheel: Path, files: dict[str, bytes], engine: ELFFile
) -> None:
    (tag,) = re.findall(r"^Tag: (.+)$", files[f"{INFO}/WHEEL"].decode(), re.MULTILINE)
    assert wheel.name == f"lvllm-{lvllm_version()}-{tag}.whl"
    python, abi, platform = tag.split("-")
    assert (python, abi) == ("cp311", "abi3")
    glibc = re.fullmatch(r"manylinux_2_(\d+)_\w+", platform)
    assert glibc is not None, platform
    section = engine.get_section_by_name(".gnu.version_r")
    assert isinstance(section, GNUVerNeedSection)
    needed = [one.name for _, versions in section.iter_versions() for one in versions]
    minors = [re.fullmatch(r"GLIBC_2\.(\d+)(\.\d+)?", name) for name in needed]
    assert max(int(minor[1]) for minor in minors if minor) <= int(glibc[1])


def test_what_the_engine_is_linked_with(engine: ELFFile) -> None:
    dynamic = engine.get_section_by_name(".dynamic")
    assert isinstance(dynamic, DynamicSection)
    tags = list(dynamic.iter_tags())
    libraries = {vars(tag)["needed"] for tag in tags if tag.entry.d_tag == "DT_NEEDED"}
    of_every_linux = {"libc.so.6", "libgcc_s.so.1", "libm.so.6", "ld-linux-x86-64.so.2"}
    assert libraries - of_every_linux == {"libtorch_cpu.so"}
    assert not {tag.entry.d_tag for tag in tags} & {"DT_RPATH", "DT_RUNPATH"}


def test_one_engine_serves_every_python_and_pytorch(engine: ELFFile) -> None:
    section = engine.get_section_by_name(".dynsym")
    assert isinstance(section, SymbolTableSection)
    symbols = list(section.iter_symbols())[1:]
    wanted = [one.name for one in symbols if one.entry.st_shndx == "SHN_UNDEF"]
    assert len(wanted) == len(symbols), "it exports something"
    assert any(name.startswith("aoti_torch_") for name in wanted), "PyTorch's stable ABI"
    # Neither functions of Python nor those of C++, which differ between releases of PyTorch.
    assert [name for name in wanted if re.match(r"_?Py[A-Z_]|_Z", name)] == []


def test_the_engine_names_no_folder_of_its_build(files: dict[str, bytes]) -> None:
    assert b"csrc/torch_bindings.cpp" in files[ENGINE], "or __FILE__ is no longer in it"
    assert re.findall(rb"(?<![\w.+-])/[\w./+-]+\.(?:h|hpp|inc|c|cc|cpp)\b", files[ENGINE]) == []
    assert str(ROOT).encode() not in files[ENGINE]


def test_the_same_bytes_again(wheel: Path, tmp_path: Path) -> None:
    again = build(tmp_path / "dist", umask=0o077)
    assert again.name == wheel.name
    assert again.read_bytes() == wheel.read_bytes()


def test_the_files_have_the_commits_time(wheel: Path) -> None:
    committed = subprocess.run(
        ["git", "log", "-1", "--format=%cd", "--date=format-local:%Y %m %d %H %M"],
        cwd=ROOT,
        env=os.environ | {"TZ": "UTC"},
        capture_output=True,
        text=True,
        check=True,
    )
    with zipfile.ZipFile(wheel) as archive:
        times = {entry.date_time[:5] for entry in archive.infolist()}
    assert times == {tuple(map(int, committed.stdout.split()))}
