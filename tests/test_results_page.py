"""The tables of docs/models.md are what docs/tested.json says."""

import json
from pathlib import Path

import pytest

from tests.e2e import results, results_page

ROW = {"median": 0.00512, "within": 0.979, "same": 1.0}
MODEL = {"family": "olmoe", "format": "bf16", "picture": False, **ROW}
FOUND: results.Found = {"models": {"olmoe": MODEL}, "formats": {"awq": ROW}}


def empty() -> str:
    return "".join(
        f"{results_page.BEGIN.format(name)}\n{results_page.END.format(name)}\n"
        for name in ("models", "formats")
    )


def test_the_page_is_current() -> None:
    for page in results_page.PAGES:
        text = page.read_text()
        assert results_page.current(text, results.read()) == text, page.name


def test_rows() -> None:
    text = results_page.current(f"before\n{empty()}after", FOUND)
    assert text.startswith("before\n")
    assert text.endswith("after")
    config = "[olmoe.yaml](../examples/configs/olmoe.yaml)"
    cells = f"{config} | bf16 | text | transformers | 0.0051 | 98% | 100%"
    assert f"| OLMoE-1B-7B | {cells} | |\n" in text
    assert "| `awq` | 0.0051 | 98% | 100% |\n" in text
    assert results_page.current(text, FOUND) == text


def test_what_has_no_place_is_refused() -> None:
    with pytest.raises(SystemExit, match="no <!-- from docs"):
        results_page.current("nothing", FOUND)
    unknown = {"models": {"x": MODEL | {"family": "unheard"}}}
    with pytest.raises(SystemExit, match="FAMILIES has no unheard"):
        results_page.current(empty(), unknown)


def test_a_record_keeps_the_other_rows(tmp_path: Path) -> None:
    file = tmp_path / "tested.json"
    results.write(FOUND, file)
    results.write({"models": {"dbrx": MODEL}}, file)
    assert set(json.loads(file.read_text())["models"]) == {"dbrx", "olmoe"}
    assert results.read(file)["formats"] == FOUND["formats"]
