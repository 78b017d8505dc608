"""README's tables of models and formats, from what the tests found (docs/tested.json).

python -m tests.e2e.table           # writes them
python -m tests.e2e.table --check   # exit code 1 if they are not current
"""

import sys
from dataclasses import dataclass
from typing import Any

from tests.e2e import record

READMES = {"README.md": 0, "README_cn.md": 1}
"""Each file, and which of two texts it has."""
BEGIN, END = "<!-- from docs/tested.json: {} -->", "<!-- end of {} -->"

Texts = tuple[str, str]
"""In English and in Chinese."""


@dataclass(frozen=True)
class Family:
    """What the tests cannot know of an architecture."""

    models: str
    """Published models that have it."""
    remarks: Texts = ("", "")
    reference: Texts = ("transformers", "transformers")
    """What computes in float32 what vLLM's output is compared with."""


FAMILIES = {
    "qwen3_moe": Family("Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder"),
    "qwen3_next": Family("Qwen3-Next, Qwen3-Coder-Next"),
    "qwen3_5_moe": Family("Qwen3.5-35B-A3B, 122B-A10B, 397B-A17B"),
    "qwen3_vl_moe": Family("Qwen3-VL-30B-A3B, 235B-A22B"),
    "qwen2_moe": Family("Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B"),
    "minimax_m2": Family(
        "MiniMax-M2, M2.1, M2.5",
        ("stock vLLM stops at its routing on CPUs", "原版 vLLM 在 CPU 上无法完成其路由"),
    ),
    "glm4_moe": Family("GLM-4.5, 4.5-Air, 4.6, 4.7"),
    "glm4_moe_lite": Family(
        "GLM-4.7-Flash",
        (
            "needs `custom_ops: [-rotary_embedding]`, as its file in examples/configs has",
            "需要 `custom_ops: [-rotary_embedding]`，examples/configs 中的文件已设置",
        ),
    ),
    "glm4v_moe": Family("GLM-4.6V, GLM-4.5V"),
    "kimi_k2": Family("Kimi-K2, the language part of Kimi-K2.5"),
    "kimi_k25": Family("Kimi-K2.5"),
    "step3p5": Family(
        "Step-3.5-Flash",
        (
            "transformers has no such model; stock vLLM stops at its routing on CPUs",
            "transformers 没有该模型；原版 vLLM 在 CPU 上无法完成其路由",
        ),
        ("the test's own model", "测试自带的模型"),
    ),
    "deepseek_v2": Family("DeepSeek-V2, V2-Lite"),
    "deepseek_v3": Family("DeepSeek-V3, V3.1, R1"),
    "deepseek_v32": Family(
        "DeepSeek-V3.2",
        (
            "without its indexer, with which vLLM does not run on CPUs: attention over all tokens,"
            " where sparse attention would pick them all",
            "去掉 vLLM 无法在 CPU 上运行的 indexer：注意力覆盖全部 token，稀疏注意力此时同样如此",
        ),
    ),
    "gpt_oss": Family("gpt-oss-20b, gpt-oss-120b"),
    "mixtral": Family("Mixtral-8x7B, 8x22B"),
    "nemotron_h": Family("Nemotron-3-Nano-30B-A3B"),
    "phimoe": Family("Phi-3.5-MoE, Phi-mini-MoE"),
    "gemma4": Family("gemma-4-26B-A4B"),
    "olmoe": Family("OLMoE-1B-7B"),
    "dbrx": Family("DBRX"),
}

FORMATS = {
    "bf16": "bf16",
    "fp8_blocks": "FP8 128x128",
    "compressed_int4_groups_of_32": "int4 (compressed-tensors)",
    "mxfp4": "MXFP4",
}
"""Short names; others stand as the schemes of tests/models/quantize.py are called."""

HEADERS = {
    "models": (
        (
            "models",
            "experts",
            "input",
            "compared with",
            "median error",
            "within 0.1",
            "same token",
            "remarks",
        ),
        ("模型", "专家格式", "输入", "对照", "误差中位数", "误差 ≤ 0.1", "相同 token", "备注"),
    ),
    "formats": (
        ("checkpoint", "median error", "within 0.1", "same token"),
        ("检查点", "误差中位数", "误差 ≤ 0.1", "相同 token"),
    ),
}
INPUTS: dict[bool, Texts] = {False: ("text", "文本"), True: ("text, picture", "文本、图片")}


def numbers(row: dict[str, Any]) -> list[str]:
    """What a comparison found, as cells."""
    return [f"{row['median']:.4f}", f"{row['within']:.0%}", f"{row['same']:.0%}"]


def models(found: record.Found, language: int) -> list[list[str]]:
    """One row for each case, families in the order of FAMILIES."""
    rows = found.get("models", {}).values()
    if unknown := {row["family"] for row in rows} - set(FAMILIES):
        raise SystemExit(f"tests/e2e/table.py: FAMILIES has no {', '.join(sorted(unknown))}")
    lines = []
    for name, family in FAMILIES.items():
        of_family = [row for row in rows if row["family"] == name]
        for i, row in enumerate(sorted(of_family, key=lambda row: (row["format"], row["picture"]))):
            format: str = row["format"]
            lines.append(
                [
                    "" if i else family.models,
                    FORMATS.get(format, format),
                    INPUTS[row["picture"]][language],
                    family.reference[language],
                    *numbers(row),
                    "" if i else family.remarks[language],
                ]
            )
    return lines


def formats(found: record.Found, language: int) -> list[list[str]]:
    """One row for each scheme."""
    return [[f"`{name}`", *numbers(row)] for name, row in found.get("formats", {}).items()]


def markdown(headers: tuple[str, ...], lines: list[list[str]]) -> str:
    rows = [list(headers), ["---"] * len(headers), *lines]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in rows).replace("|  |", "| |")


def current(text: str, found: record.Found, language: int) -> str:
    """README's `text` with both tables as they should be."""
    for name, make in (("models", models), ("formats", formats)):
        begin, end = BEGIN.format(name), END.format(name)
        before, found_begin, rest = text.partition(begin)
        _, found_end, after = rest.partition(end)
        if not (found_begin and found_end):
            raise SystemExit(f"tests/e2e/table.py: no {begin} and {end} in this order")
        table = markdown(HEADERS[name][language], make(found, language))
        text = f"{before}{begin}\n{table}{end}{after}"
    return text


def main() -> None:
    found = record.read()
    for name, language in READMES.items():
        file = record.ROOT / name
        text = file.read_text()
        wanted = current(text, found, language)
        if wanted == text:
            continue
        if "--check" in sys.argv[1:]:
            raise SystemExit(f"{name} is not what docs/tested.json says: run `make models-table`")
        file.write_text(wanted)


if __name__ == "__main__":
    main()
