"""Find GoogleTest's sources for the C++ tests, or download them as the system's package.

The package is unpacked below build/. Nothing is installed, so this works without root.
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
    # apt gets package lists and archives of our own. The system's may be missing, and only root
    # may write them.
    lists, archives = destination / "lists", destination / "archives"
    for folder in (lists, archives):
        (folder / "partial").mkdir(parents=True, exist_ok=True)
    apt = ["apt-get", "-qq", "-o", f"Dir::State::Lists={lists}", "-o", f"Dir::Cache={archives}"]
    apt += ["-o", "APT::Sandbox::User="]  # apt's own user could not write here.
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
