"""Where the servers and the load of a measurement write their logs."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def log_folder(prefix: str) -> Iterator[Path]:
    """A new folder for logs, which stays if anything was written there."""
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    try:
        yield folder
    finally:
        with suppress(OSError):  # It has logs, or somebody has removed it.
            for file in folder.iterdir():
                if file.stat().st_size == 0:
                    file.unlink()
            folder.rmdir()
