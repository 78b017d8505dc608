"""Keeps the results of the tests of whole models in docs/tested.json, for docs/models.md."""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TESTED = ROOT / "docs" / "tested.json"

Found = dict[str, dict[str, dict[str, Any]]]
"""By table ("models", "formats"), by family or scheme."""


def read(file: Path = TESTED) -> Found:
    """The records in `file`; none if there is no file."""
    return json.loads(file.read_text()) if file.exists() else {}


def write(found: Found, file: Path) -> None:
    """Put `found` into `file`, over what stands there of the same families and schemes."""
    merged = read(file)
    for table, rows in found.items():
        merged[table] = dict(sorted((merged.get(table, {}) | rows).items()))
    file.write_text(json.dumps(dict(sorted(merged.items())), indent=1) + "\n")
