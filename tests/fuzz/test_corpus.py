"""Each input of the corpus ends as it must, without a fuzzing engine."""

import importlib
from pathlib import Path

import pytest

from tests.fuzz import rules
from tests.fuzz.inputs import CORPUS, TARGETS

INPUTS = sorted(CORPUS.glob("*/*"))


@pytest.mark.parametrize("path", INPUTS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_inputs(path: Path) -> None:
    target = importlib.import_module(f"tests.fuzz.targets.{path.parent.name}")
    with rules.bounded():
        target.one_input(path.read_bytes())


def test_every_target_has_inputs() -> None:
    assert {path.parent.name for path in INPUTS} == set(TARGETS)
