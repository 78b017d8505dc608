"""Finds GoogleTest's sources for the C++ tests: the installed ones, else the system's package.

The package is downloaded and unpacked below build/; nothing is installed and root is not needed.
"""

import shutil
import subprocess
from pathlib import Path

from build_tools.errors import BuildError
from build_tools.target import ROOT

# Where Debian and Ubuntu's package `googletest` puts the sources, below /.
PLACE = Path("usr", "src", "googletest")


def find_googletest() -> Path:
    """The folder with GoogleTest's CMakeLists.txt. Raises BuildError."""
    fetched = ROOT / "build" / "googletest"
    for root in (Path("/"), fetched):
        if (root / PLACE / "CMakeLists.txt").exists():
            return root / PLACE
    _fetch(fetched)
    return fetched / PLACE


def _fetch(destination: Path) -> None:
    advice = "install it (Debian, Ubuntu: apt install googletest)"
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise BuildError(f"the C++ tests need GoogleTest's sources: {advice}")
    # Lists and archives of our own: the system's may be missing, and are root's to write.
    lists, archives = destination / "lists", destination / "archives"
    for folder in (lists, archives):
        (folder / "partial").mkdir(parents=True, exist_ok=True)
    apt = ["apt-get", "-qq", "-o", f"Dir::State::Lists={lists}", "-o", f"Dir::Cache={archives}"]
    apt += ["-o", "APT::Sandbox::User="]  # its own user could not write here
    for action in ("update", "download"):
        package = ["googletest"] if action == "download" else []
        done = subprocess.run([*apt, action, *package], cwd=destination, capture_output=True)
        if done.returncode != 0:
            reason = done.stderr.decode(errors="replace").strip().splitlines()
            raise BuildError(
                f"cannot download GoogleTest ({reason[-1] if reason else action}): {advice}"
            )
    for archive in destination.glob("googletest_*.deb"):
        subprocess.run(["dpkg-deb", "-x", archive, destination], check=True)
    shutil.rmtree(lists)
