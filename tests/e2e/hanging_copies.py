"""A plugin of vLLM with which copies of weights to the stand-in accelerator hang on demand.

They hang while a certain file exists.
"""

import os
import time
from pathlib import Path
from typing import Any

from tests.e2e.generate import ROOT

_VARIABLE = "TEST_COPIES_HANG"
WEIGHTS = 1 << 16
"""A copy of at least this many bytes is one of weights: a small model's activations take less."""


class HangingCopies:
    """Makes copies hang in a server that is started with the variables in `environment`.

    Args:
        folder: a new folder, for the plugin's metadata and for the file.
    """

    def __init__(self, folder: Path) -> None:
        info = folder / "copies_hang-0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: copies-hang\nVersion: 0\n")
        (info / "entry_points.txt").write_text(
            f"[vllm.general_plugins]\ncopies_hang = {__name__}:register\n"
        )
        paths = [str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")]
        self.environment = {
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            _VARIABLE: str(folder),
        }
        self._folder = folder

    def begin(self) -> None:
        """From now on no copy of weights ends."""
        (self._folder / "hang").touch()

    def wait(self, seconds: float = 60) -> None:
        """Wait until a copy hangs. Raises AssertionError if none does."""
        until = time.monotonic() + seconds
        while not (self._folder / "hanging").exists():
            assert time.monotonic() < until, "no weights were copied"
            time.sleep(0.05)


def register() -> None:
    """vLLM calls this in each of its processes."""
    from lvllm.gpu.stand_in import StandInAccelerator

    copy = StandInAccelerator.copy
    if copy.__module__ == __name__:
        return
    folder = Path(os.environ[_VARIABLE])

    def hang() -> None:
        while (folder / "hang").exists():
            (folder / "hanging").touch()
            time.sleep(0.05)

    def copy_or_hang(self: Any, target: Any, source: Any, stream: Any) -> None:
        if source.nbytes >= WEIGHTS:
            self.launch(hang, stream)
        copy(self, target, source, stream)

    StandInAccelerator.copy = copy_or_hang  # type: ignore[method-assign]
