"""A page for each file of examples/configs, in each language."""

import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks.pages import SUFFIXES, table
from benchmarks.plans.models import MODELS
from benchmarks.recipes.machines import LOAD, OTHER_COLUMNS, RECIPES, plan_of, sentence
from benchmarks.recipes.texts import INDEX, MACHINES, PAGE

__all__ = ["index", "page", "rows"]

CONFIGS = Path(__file__).parents[2] / "examples/configs"
ROW = re.compile(r"^\| \[(?P<file>[\w.-]+)\.yaml\]\([^)]*\) \| (?P<models>.*) \|$", re.MULTILINE)

PLANNED = {
    "deepseek-v3": ("DeepSeek-R1", "DeepSeek-V3-AWQ"),
    "glm-4-moe": ("GLM-4.5-Air-FP8", "GLM-4.5-FP8"),
    "gpt-oss": ("gpt-oss-120b",),
    "kimi-k2": ("Kimi-K2",),
    "minimax-m2": ("MiniMax-M2",),
    "mixtral": ("Mixtral-8x22B",),
    "qwen3-coder": ("Qwen3-Coder-480B-A35B-FP8",),
    "qwen3-moe": ("Qwen3-30B-A3B", "Qwen3-235B-A22B-FP8"),
    "qwen3-next": ("Qwen3-Next-80B-A3B",),
}
"""The models of benchmarks.plans that belong to a family."""
assert {name for names in PLANNED.values() for name in names} == {model.name for model in MODELS}


def rows() -> dict[str, str]:
    """The families by the names of their files, and their models."""
    text = (CONFIGS / "README.md").read_text()
    return {match["file"]: match["models"] for match in ROW.finditer(text)}


def index(language: str) -> str:
    """The page that lists the families."""
    lines = [
        f"| [{file}.md]({file}{SUFFIXES[language]}) | {_listed(models, language)} |"
        for file, models in rows().items()
    ]
    return INDEX[language].format(rows="\n".join(lines))


def page(file: str, models: str, language: str) -> str:
    """The page of a family."""
    config = (CONFIGS / f"{file}.yaml").read_text()
    model = re.search(r"^model: (.*)$", config, re.MULTILINE)
    assert model, file
    return PAGE[language].format(
        models=_listed(models, language),
        model=model[1],
        file=file,
        config=config,
        machines=_machines(PLANNED.get(file, ()), language),
    )


def _listed(models: str, language: str) -> str:
    return models.replace(", ", "、") if language == "zh" else models


def _machines(models: Sequence[str], language: str) -> str:
    """The part about the machines that a family's models fit on, if they are planned for."""
    if not models:
        return ""
    tables = []
    for model in models:
        lines = [
            (one.name(language), *sentence(plan_of(model, one), language))
            for one in RECIPES.values()
        ]
        tables.append(table([(model, *OTHER_COLUMNS[language]), *lines]))
    return MACHINES[language].format(
        prompt=LOAD.prompt, answer=LOAD.answer, tables="\n".join(tables)
    )
