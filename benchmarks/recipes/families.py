"""A page for each file of examples/configs."""

import re
from pathlib import Path

from benchmarks.plans.models import MODELS
from benchmarks.recipes.machines import LOAD, RECIPES, plan_of, sentence, table

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


def index() -> str:
    """The page that lists the families."""
    lines = [f"| [{file}.md]({file}.md) | {models} |" for file, models in rows().items()]
    return "\n".join(
        [
            "# Model families",
            "",
            "`python -m benchmarks.recipes` writes this page and those that it lists, from "
            "[examples/configs](../../examples/configs/README.md) and from what `lvllm plan` says.",
            "",
            "| page | models |",
            "|---|---|",
            *lines,
            "",
        ]
    )


def page(file: str, models: str) -> str:
    """The page of a family."""
    config = (CONFIGS / f"{file}.yaml").read_text()
    model = re.search(r"^model: (.*)$", config, re.MULTILINE)
    assert model, file
    parts = [
        f"# {models}\n",
        "`python -m benchmarks.recipes` writes this page; do not edit it by hand.\n",
        "## Serve it\n",
        "With the settings that `lvllm serve` chooses for this machine:\n",
        f"    lvllm plan {model[1]}\n    lvllm serve {model[1]}\n",
        "Or with the family's configuration:\n",
        f"    LVLLM_MOE_NUMA_ENABLED=1 vllm serve --config examples/configs/{file}.yaml\n",
        "## The configuration\n",
        "[What to change in it](../../examples/configs/README.md) is the same for all families.\n",
        f"```yaml\n{config}```\n",
    ]
    if planned := PLANNED.get(file):
        parts += [
            "## Which machine\n",
            f"What `lvllm plan` predicts for one user with a prompt of {LOAD.prompt} tokens and\n"
            f"an answer of {LOAD.answer}, without rounding weights. GPUs are estimates, because\n"
            "LvLLM has not run on one yet ([how these numbers are made](../plan.md)).\n",
            *(_machines(name) for name in planned),
        ]
    parts.append("[models.md](../models.md) says what of the family has been tested, and how.\n")
    return "\n".join(parts)


def _machines(model: str) -> str:
    head = (model, "prefill, tok/s", "decode, tok/s", "way")
    lines = [(one.what, *sentence(plan_of(model, one))) for one in RECIPES.values()]
    return table([head, *lines])
