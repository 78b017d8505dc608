"""Packs vLLM and what it needs for a machine that has a GPU and PyTorch, but no network.

    python -m tests.gpu.on_device.pack FOLDER --installed NAMES [--python 3.12]

NAMES is a file with the packages that the machine has, a name a line (`pip list --format=freeze`
there, without versions). FOLDER gets an archive of what the first two steps want, pieces of
at most 48 MiB with vLLM, a manifest, and the lines that unpack them there. vLLM's libraries are
those with PyTorch's stable interface, which load with older PyTorch than vLLM asks for. Of
FlashAttention only the third version is packed, for GPUs of compute capability 9.0: without any,
vLLM cannot be imported on a GPU. The entry points are vLLM's and LvLLM's, so that vLLM there finds
the plugin.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Annotated

import typer
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lvllm.supported import TESTED
from tests.gpu.on_device.machine import PACKAGES

PIECE_BYTES = 48 << 20
PLATFORMS = [
    word
    for name in (*(f"manylinux_2_{minor}" for minor in range(39, 4, -1)), "manylinux2014")
    for word in ("--platform", f"{name}_x86_64")
]
"""pip takes each of these names literally."""
LEFT_OUT = (
    "vllm/vllm-rs",
    "vllm/vllm_flash_attn/_vllm_fa2",
    "vllm/third_party/deep_gemm/",
    "vllm/third_party/fmha_sm100/",
)
"""Beginnings of files of vLLM's wheel that a first run does not need: 400 of 820 MB."""
NOT_NEEDED = {
    "fastsafetensors",
    "flashinfer-python",
    "humming-kernels",
    "instanttensor",
    "mcp",
    "nvidia-cudnn-frontend",
    "nvidia-cutlass-dsl",
    "nvtx",
    "pynvvideocodec",
    "quack-kernels",
    "tilelang",
    "tokenspeed-mla",
    "torchcodec",
}
"""Requirements of kernels that are not used, and of what a first run does not serve."""
FIRST = "first.tar.xz"
PLUGIN = "lvllm = lvllm.plugin:register\n"


def download(folder: Path, python: str, *names: str) -> None:
    """Download wheels, without what they need, for the machine's Python."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    where = ["--python-version", python, "-d", str(folder)]
    subprocess.run([*command, *PLATFORMS, *where, *names], check=True)


def needed(metadata: str, installed: set[str], python: str) -> list[str]:
    """Return what vLLM and LvLLM need and the machine has not, each as NAME==VERSION."""
    environment = {"python_version": python, "extra": ""}
    wanted = [
        Requirement(line.removeprefix("Requires-Dist: "))
        for line in metadata.splitlines()
        if line.startswith("Requires-Dist: ")
    ]
    own = Path("requirements/lvllm.txt").read_text().splitlines()
    wanted += [Requirement(line) for line in own if line and line[0] not in "#-"]
    asked = [
        str(one).partition(";")[0]
        for one in wanted
        if canonicalize_name(one.name) not in installed | NOT_NEEDED
        and (one.marker is None or one.marker.evaluate(environment))
    ]
    return resolved(asked, installed, python)


def resolved(asked: list[str], installed: set[str], python: str) -> list[str]:
    """Return these packages and what they need, without what the machine has, as NAME==VERSION."""
    with tempfile.NamedTemporaryFile("r", suffix=".json") as report:
        command = [sys.executable, "-m", "pip", "install", "-q", "--dry-run", "--ignore-installed"]
        where = ["--target", "/nowhere", "--only-binary=:all:", "--python-version", python]
        subprocess.run([*command, *where, *PLATFORMS, *asked, "--report", report.name], check=True)
        found = [entry["metadata"] for entry in json.load(report)["install"]]
    return [
        f"{one['name']}=={one['version']}"
        for one in found
        if canonicalize_name(one["name"]) not in installed | NOT_NEEDED | {"torch", "triton"}
        and not one["name"].startswith("nvidia-")
    ]


def unpack_vllm(wheel: Path, site: Path) -> str:
    """Unpack vLLM's wheel without what is left out. Return its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.startswith(LEFT_OUT)]
        archive.extractall(site, names)
    (info,) = site.glob("vllm-*.dist-info")
    entries = info / "entry_points.txt"
    text = entries.read_text()
    group = "[vllm.general_plugins]\n"
    entries.write_text(
        text.replace(group, group + PLUGIN) if group in text else text + group + PLUGIN
    )
    return (info / "METADATA").read_text()


def main(
    folder: Path,
    installed: Annotated[Path, typer.Option(help="a file with names of packages")],
    python: Annotated[str, typer.Option(help="the machine's Python")] = "3.12",
) -> None:
    """Pack vLLM for a machine without a network."""
    names: set[str] = {
        canonicalize_name(line.strip()) for line in installed.read_text().splitlines()
    }
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        wheels, site, first = (Path(temporary, name) for name in ("wheels", "site", "first"))
        download(wheels, python, f"vllm=={TESTED}")
        (vllm,) = wheels.glob("vllm-*.whl")
        wanted = needed(unpack_vllm(vllm, site), names, python)
        print("packed beside vLLM:", *wanted)
        vllm.unlink()
        download(wheels, python, *wanted)
        unpack(wheels, site)
        asked = [name for name in PACKAGES if canonicalize_name(name) not in names]
        pinned = {one.partition("==")[0]: one for one in wanted}
        small = [pinned.get(one.partition("==")[0], one) for one in resolved(asked, names, python)]
        first.mkdir()
        if small:
            download(first / "wheels", python, *small)
            unpack(first / "wheels", first / "site")
        compress(first / "site", folder / FIRST)
        whole = Path(temporary, "site.tar.xz")
        compress(site, whole)
        data = whole.read_bytes()
    manifest = [f"{hashlib.sha256((folder / FIRST).read_bytes()).hexdigest()}  {FIRST}\n"]
    for number, begin in enumerate(range(0, len(data), PIECE_BYTES), 1):
        piece = data[begin : begin + PIECE_BYTES]
        (folder / f"piece-{number}").write_bytes(piece)
        manifest.append(f"{hashlib.sha256(piece).hexdigest()}  piece-{number}\n")
    (folder / "manifest").write_text("".join(manifest))
    print(f"{FIRST} has {', '.join(small) or 'nothing'}. Before the first step, unpack it with")
    print(f"  mkdir -p site && tar xJf {FIRST} -C site")
    print(f"{len(manifest) - 1} pieces of {len(data) / 1e6:.0f} MB together have vLLM. Before the")
    print("third step, unpack them with")
    print("  sha256sum -c manifest && cat piece-* | tar xJ -C site")
    print("and set PYTHONPATH to that site in each step.")


def unpack(wheels: Path, site: Path) -> None:
    """Unpack the wheels of a folder into another one."""
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)


def compress(site: Path, archive: Path) -> None:
    site.mkdir(exist_ok=True)
    subprocess.run(["tar", "-C", site, "-I", "xz -T0", "-cf", archive, "."], check=True)


if __name__ == "__main__":
    typer.run(main)
