"""Writes the tables of docs/models.md and its translation from the results in docs/tested.json.

python -m tests.e2e.results_page           # writes them
python -m tests.e2e.results_page --check   # exits with 1 if they are not current
"""

import sys
from dataclasses import dataclass
from typing import Any

from tests.e2e import results

PAGES = [results.ROOT / "docs" / name for name in ("models.md", "models.zh.md")]
BEGIN, END = "<!-- from docs/tested.json: {} -->", "<!-- end of {} -->"


@dataclass(frozen=True)
class Family:
    """What the tests cannot know of an architecture."""

    models: str
    """Published models that have it."""
    configs: tuple[str, ...] = ()
    """Their files in examples/configs, without `.yaml`."""
    remarks: str = ""
    reference: str = "transformers"
    """The float32 implementation that vLLM's output is compared with."""


THROUGH_TRANSFORMERS = "vLLM runs it through its Transformers backend"

FAMILIES = {
    "qwen3_moe": Family(
        "Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder", ("qwen3-moe", "qwen3-coder")
    ),
    "qwen3_next": Family("Qwen3-Next, Qwen3-Coder-Next", ("qwen3-next", "qwen3-coder-next")),
    "qwen3_5_moe": Family("Qwen3.5-35B-A3B, 122B-A10B, 397B-A17B", ("qwen3.5-moe",)),
    "qwen3_vl_moe": Family("Qwen3-VL-30B-A3B, 235B-A22B", ("qwen3-vl-moe",)),
    "qwen2_moe": Family("Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B"),
    "minimax_m2": Family(
        "MiniMax-M2, M2.1, M2.5", ("minimax-m2",), "stock vLLM stops at its routing on CPUs"
    ),
    "glm4_moe": Family("GLM-4.5, 4.5-Air, 4.6, 4.7", ("glm-4-moe",)),
    "glm4_moe_lite": Family(
        "GLM-4.7-Flash",
        ("glm-4.7-flash",),
        "needs `custom_ops: [-rotary_embedding]`, which its configuration sets",
    ),
    "glm4v_moe": Family("GLM-4.6V, GLM-4.5V", ("glm-4.6v",)),
    "kimi_k2": Family("Kimi-K2, the language part of Kimi-K2.5", ("kimi-k2",)),
    "kimi_k25": Family("Kimi-K2.5", ("kimi-k2.5",)),
    "step3p5": Family(
        "Step-3.5-Flash",
        ("step-3.5-flash",),
        "transformers has no such model; stock vLLM stops at its routing on CPUs",
        "the test's own model",
    ),
    "deepseek_v2": Family("DeepSeek-V2, V2-Lite"),
    "deepseek_v3": Family("DeepSeek-V3, V3.1, R1", ("deepseek-v3",)),
    "deepseek_v32": Family(
        "DeepSeek-V3.2",
        ("deepseek-v3.2",),
        "tested without its indexer, with which vLLM does not run on CPUs: attention covers all"
        " tokens, and the test's prompts are so short that sparse attention would pick them all",
    ),
    "longcat_flash": Family(
        "LongCat-Flash-Chat, LongCat-Flash-Thinking",
        ("longcat-flash",),
        "needs `custom_ops: [-rotary_embedding]`, which its configuration sets; stock vLLM stops at"
        " its routing on CPUs",
    ),
    "gpt_oss": Family("gpt-oss-20b, gpt-oss-120b", ("gpt-oss",)),
    "mixtral": Family("Mixtral-8x7B, 8x22B", ("mixtral",)),
    "nemotron_h": Family("Nemotron-3-Nano-30B-A3B", ("nemotron-h-moe",)),
    "phimoe": Family("Phi-3.5-MoE, Phi-mini-MoE", ("phi-moe",)),
    "gemma4": Family("gemma-4-26B-A4B", ("gemma-4-moe",)),
    "olmoe": Family("OLMoE-1B-7B", ("olmoe",)),
    "dbrx": Family("DBRX"),
    "afmoe": Family("Trinity-Mini, Trinity-Nano (AFMoE)"),
    "cohere2_moe": Family("Cohere2-MoE"),
    "dots1": Family("dots.llm1", remarks=THROUGH_TRANSFORMERS),
    "ernie4_5_moe": Family(
        "ERNIE-4.5-21B-A3B, 300B-A47B",
        remarks="stock vLLM leaves out the router's correction bias on CPUs",
    ),
    "exaone_moe": Family("K-EXAONE-236B-A23B"),
    "flex_olmo": Family("FlexOlmo-7x7B", remarks=THROUGH_TRANSFORMERS),
    "granitemoe": Family("Granite-3.0-1B-A400M, 3B-A800M"),
    "granitemoeshared": Family("Granite MoE with shared experts"),
    "granitemoehybrid": Family("Granite-4.0-H-Tiny, H-Small"),
    "hunyuan_v1_moe": Family("Hunyuan-A13B", remarks=THROUGH_TRANSFORMERS),
    "llama4": Family("the language part of Llama-4-Scout and Maverick"),
    "mellum": Family("Mellum (MoE)", remarks=THROUGH_TRANSFORMERS),
    "solar_open": Family("Solar-Open-100B", remarks=THROUGH_TRANSFORMERS),
}

FORMATS = {
    "bf16": "bf16",
    "fp8_blocks": "FP8 128x128",
    "compressed_int4_groups_of_32": "int4 (compressed-tensors)",
    "mxfp4": "MXFP4",
}
"""Short names. Other formats are listed under their names in tests/models/quantize.py."""

HEADERS = {
    "models": (
        "models",
        "configuration",
        "experts",
        "input",
        "compared with",
        "median error",
        "within 0.1",
        "same token",
        "remarks",
    ),
    "formats": ("checkpoint", "median error", "within 0.1", "same token"),
}


def numbers(row: dict[str, Any]) -> list[str]:
    """The results of one comparison, as cells."""
    return [f"{row['median']:.4f}", f"{row['within']:.0%}", f"{row['same']:.0%}"]


def models(found: results.Found) -> list[list[str]]:
    """One row for each tested case, with the families in the order of FAMILIES."""
    rows = found.get("models", {}).values()
    if unknown := {row["family"] for row in rows} - set(FAMILIES):
        raise SystemExit(f"tests/e2e/results_page.py: FAMILIES has no {', '.join(sorted(unknown))}")
    lines = []
    for name, family in FAMILIES.items():
        configs = ", ".join(f"[{c}.yaml](../examples/configs/{c}.yaml)" for c in family.configs)
        of_family = [row for row in rows if row["family"] == name]
        for i, row in enumerate(sorted(of_family, key=lambda row: (row["format"], row["picture"]))):
            format: str = row["format"]
            lines.append(
                [
                    "" if i else family.models,
                    "" if i else configs,
                    FORMATS.get(format, format),
                    "text, picture" if row["picture"] else "text",
                    family.reference,
                    *numbers(row),
                    "" if i else family.remarks,
                ]
            )
    return lines


def formats(found: results.Found) -> list[list[str]]:
    """One row for each quantisation scheme."""
    return [[f"`{name}`", *numbers(row)] for name, row in found.get("formats", {}).items()]


def markdown(headers: tuple[str, ...], lines: list[list[str]]) -> str:
    rows = [list(headers), ["---"] * len(headers), *lines]
    return "".join(
        "|" + "".join(f" {cell} |" if cell else " |" for cell in cells) + "\n" for cells in rows
    )


def current(text: str, found: results.Found) -> str:
    """The page's `text` with both tables replaced by those of `found`."""
    for name, make in (("models", models), ("formats", formats)):
        begin, end = BEGIN.format(name), END.format(name)
        before, found_begin, rest = text.partition(begin)
        _, found_end, after = rest.partition(end)
        if not (found_begin and found_end):
            raise SystemExit(f"tests/e2e/results_page.py: no {begin} and {end} in this order")
        text = f"{before}{begin}\n{markdown(HEADERS[name], make(found))}{end}{after}"
    return text


def main() -> None:
    found = results.read()
    for page in PAGES:
        text = page.read_text()
        wanted = current(text, found)
        if wanted == text:
            continue
        if "--check" in sys.argv[1:]:
            name = page.relative_to(results.ROOT)
            raise SystemExit(f"{name} is not what docs/tested.json says: run `make models-table`")
        page.write_text(wanted)


if __name__ == "__main__":
    main()
