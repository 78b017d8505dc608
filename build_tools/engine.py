"""Build the C++ engine with CMake and Ninja, both of which come from pip.

`python -m build_tools.engine` builds lvllm/engine/_engine.so in the checkout, incrementally;
`python -m build_tools.engine test` builds and runs the C++ tests; `test asan` and `test tsan` do so
under sanitizers. `test emulated` runs the kernels of every instruction set on emulated
instructions, and `test emulated-asan` does so under sanitizers. `test aarch64` cross-compiles the
portable kernels for 64-bit ARM, and runs their tests on an emulated CPU. `build-tests asan tsan`
builds those tests and runs none.
"""

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from build_tools import codebooks
from build_tools.errors import BuildError
from build_tools.googletest import find_googletest
from build_tools.target import ROOT

BUILD = ROOT / "build"
LIBRARY = Path("lvllm", "engine", "_engine.so")

SANITIZERS = {"asan": "address,undefined", "tsan": "thread"}
EMULATED = "emulated"
AARCH64 = "aarch64"

# QEMU's emulation of programs has no memory policies, no seccomp and no page tables to look at.
NOT_EMULATED = (
    "Allocate.PagesComeWhenTouchedAndOnTheNodeAskedFor"
    "|Allocate.EveryPageLiesWhereThePlanSays"
    "|Allocate.InterleavesOverAllNodes"
    "|Shared.HugePagesForAllProcessesFromATouchedByteEach"
    "|Nodes.PlacesPagesInAContainerThatRefusesMemoryPolicies"
)

# The ways to build the tests beside the plain one. Each has a build folder of its own, because all
# object files differ.
VARIANTS = (
    *SANITIZERS,
    EMULATED,
    *(f"{EMULATED}-{sanitizer}" for sanitizer in SANITIZERS),
    AARCH64,
)

# The first GCC that knows C++20 and the AMX and AVX512-BF16 intrinsics.
OLDEST_GCC = 11


def find_compiler() -> str:
    """Return the C++ compiler: $CXX, else g++. Raises BuildError without one that knows C++20."""
    compiler = os.environ.get("CXX") or "g++"
    path = shutil.which(compiler)
    if path is None:
        raise BuildError(
            f"no C++ compiler: `{compiler}` is not there; install g++ {OLDEST_GCC} or newer "
            "(Debian, Ubuntu: apt install g++), or set CXX"
        )
    banner = _output(path, "--version")
    version = _output(path, "-dumpversion").split(".")[0]
    if "clang" not in banner and re.fullmatch(r"\d+", version) and int(version) < OLDEST_GCC:
        raise BuildError(f"{path} is GCC {version}: the engine needs g++ {OLDEST_GCC} or newer")
    return path


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def build_engine(destination: Path) -> None:
    """Build the engine and put it at `destination`/lvllm/engine/_engine.so. Raises BuildError."""
    build, stage = BUILD / "engine", BUILD / "engine-install"
    _compile(build)
    _run(_tool("cmake"), "--install", str(build), "--prefix", str(stage))
    target = destination / LIBRARY
    target.parent.mkdir(parents=True, exist_ok=True)
    # The new file takes the old one's place by a rename. A copy would write into the old file,
    # which a running server has mapped.
    new = target.with_suffix(".new")
    shutil.copy2(stage / LIBRARY, new)
    new.rename(target)


def build_tests(variant: str | None = None) -> Path:
    """Build the C++ tests, if asked as one of VARIANTS, and return their folder below build/.

    Raises BuildError.
    """
    # The plain tests share the engine's object files, half of which take over 20 s to compile.
    build = BUILD / (f"tests-{variant}" if variant else "engine")
    options = ["-DLK_BUILD_TESTS=ON", f"-DLK_GOOGLETEST={find_googletest()}"]
    if variant:
        options.append("-DLK_BUILD_TORCH_OPS=OFF")
    if variant == AARCH64:
        options += _aarch64()
    for part in variant.split("-") if variant and variant != AARCH64 else ():
        sanitizer = SANITIZERS.get(part)
        options += [f"-DLK_SANITIZE={sanitizer}" if sanitizer else "-DLK_EMULATE=ON"]
    _compile(build, *options)
    return build


def run_tests(variant: str | None = None) -> None:
    """Build the C++ tests and run them. Raises BuildError if a test fails."""
    build = build_tests(variant)
    # Tests run side by side: most of a test's time is the comparison in plain C++, on one thread.
    at_once = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    how = ["--parallel", at_once, "--output-on-failure", "--no-tests=error"]
    if variant == AARCH64:
        how += ["--exclude-regex", NOT_EMULATED]
    _run(_tool("ctest"), "--test-dir", str(build), *how)


def _aarch64() -> list[str]:
    """CMake's options that cross-compile and emulate. Raises BuildError if tools are missing."""
    tools = [f"{AARCH64}-linux-gnu-gcc", f"{AARCH64}-linux-gnu-g++", f"qemu-{AARCH64}"]
    c, cxx, emulator = map(shutil.which, tools)
    if not (c and cxx and emulator):
        raise BuildError(
            f"the tests for {AARCH64} need a cross compiler and an emulator "
            f"(Debian, Ubuntu: apt install g++-{AARCH64}-linux-gnu qemu-user)"
        )
    return [
        f"-DCMAKE_SYSTEM_PROCESSOR={AARCH64}",
        "-DCMAKE_SYSTEM_NAME=Linux",
        f"-DCMAKE_C_COMPILER={c}",
        f"-DCMAKE_CXX_COMPILER={cxx}",
        f"-DCMAKE_CROSSCOMPILING_EMULATOR={emulator};-L;/usr/{AARCH64}-linux-gnu",
    ]


def find_torch() -> Path | None:
    """The folder of the PyTorch to build with: the importable one, else the environment's own.

    pip hides the environment's packages from an isolated build. But the environment's PyTorch is
    the one that the engine will run with, and unpacking another takes longer than everything else
    in the build.
    """
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.submodule_search_locations:
        return Path(spec.submodule_search_locations[0])
    installed = Path(sysconfig.get_path("platlib"), "torch")
    return installed if (installed / "include").is_dir() else None


def check_tools() -> None:
    """Raises BuildError if a tool that the build needs is missing."""
    find_compiler()
    _torch()
    _tool("cmake")
    _tool("ninja")


def _torch() -> Path:
    torch = find_torch()
    if torch is None:
        raise BuildError(
            f"PyTorch is not installed in {sys.executable}, and the engine is built with its "
            "headers: pip install -r requirements/build.txt (after use_existing_torch.py: "
            "install your PyTorch first)"
        )
    return torch


def _compile(build: Path, *options: str) -> None:
    torch = _torch()
    configure = [_tool("cmake"), "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
    configure += [f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}", "-DCMAKE_BUILD_TYPE=Release"]
    configure += [f"-DCMAKE_CXX_COMPILER={find_compiler()}", f"-DLK_TORCH_INCLUDE={torch}/include"]
    configure += [f"-DLK_TORCH_LIBRARY={torch}/lib/libtorch_cpu.so", *options]
    generated = BUILD / "generated"
    codebooks.write(generated)
    configure += [f"-DLK_GENERATED={generated}"]
    # An isolated pip build has its tools in a folder that is deleted afterwards. So CMake's cache
    # is made anew for every other command line. The object files stay, and Ninja reuses those whose
    # compiler command is the same.
    configured = build / "configured-with.txt"
    command = "\n".join(configure)
    if not configured.exists() or configured.read_text() != command:
        _run(*configure, "--fresh")
        configured.write_text(command)
    jobs = os.environ.get("MAX_JOBS")
    _run(_tool("cmake"), "--build", str(build), *(["--parallel", jobs] if jobs else []))


def _tool(name: str) -> str:
    """The path of cmake, ctest or ninja as pip installed them. PATH is not searched."""
    package = "ninja" if name == "ninja" else "cmake"
    try:
        module = importlib.import_module(package)
    except ImportError:
        raise BuildError(
            f"{package} is not installed in {sys.executable}: pip install -r requirements/build.txt"
        ) from None
    return str(Path(module.BIN_DIR if name == "ninja" else module.CMAKE_BIN_DIR, name))


def _run(*command: str) -> None:
    sys.stdout.flush()
    if subprocess.run(command).returncode != 0:
        tool = Path(command[0]).name
        what = "the C++ tests failed" if tool == "ctest" else "the engine did not build"
        raise BuildError(f"{what}: see the output of {tool}")


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            build_engine(ROOT)
        case ["test"]:
            run_tests()
        case ["test", variant] if variant in VARIANTS:
            run_tests(variant)
        case ["build-tests", *variants] if variants and set(variants) <= set(VARIANTS):
            for variant in variants:
                build_tests(variant)
        case _:
            sys.exit(
                "usage: python -m build_tools.engine [test [VARIANT] | build-tests VARIANT ...]; "
                f"a VARIANT is one of {', '.join(VARIANTS)}"
            )
