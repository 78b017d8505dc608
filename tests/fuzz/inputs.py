"""The targets, and the inputs that fuzzing starts from."""

from pathlib import Path

__all__ = ["CORPUS", "TARGETS"]

_HERE = Path(__file__).parent
CORPUS = _HERE / "corpus"
"""A folder for each target. Inputs that once failed stay here under a name that says why."""
TARGETS = tuple(
    sorted(path.stem for path in (_HERE / "targets").glob("*.py") if path.stem != "__init__")
)
