"""The machines of the recipes, and what `lvllm plan` says of published models on them."""

from dataclasses import dataclass
from functools import cache

from benchmarks.pages import table
from benchmarks.plans.models import MODELS, shape_of
from lvllm.planning.choice import Plan, choose
from lvllm.planning.description import Description, machine_of
from lvllm.planning.machine import Machine
from lvllm.planning.placement import Load
from lvllm.planning.settings import as_yaml, settings_of
from lvllm.units import GIB

__all__ = ["LOAD", "OTHER_COLUMNS", "RECIPES", "Recipe", "filled", "plan_of", "sentence"]

LOAD = Load(prompt=8192, answer=512, context=16384)
BEGIN, END = "<!-- from lvllm plan: {} -->\n", "<!-- end of {} -->\n"
MODEL_COLUMN = {"en": "model", "zh": "模型"}
OTHER_COLUMNS = {
    "en": ("prefill, tok/s", "decode, tok/s", "way"),
    "zh": ("预填充，tok/s", "解码，tok/s", "方式"),
}
WAYS: dict[str, dict[str, str]] = {
    "en": {},
    "zh": {
        "everything on the CPU": "全部在 CPU 上",
        "everything on the GPU": "全部在 GPU 上",
        "every batch streamed": "每个批次都流式复制",
        "long prompts streamed": "长提示流式复制",
        "experts on the CPU": "专家在 CPU 上",
        "streamed and cached": "流式复制并缓存",
        "most used experts cached": "缓存最常用的专家",
    },
}
NOT_FIT = {"en": "does not fit", "zh": "装不下"}


@dataclass(frozen=True)
class Recipe:
    """A machine with the page that is for it."""

    what: str
    chinese: str
    """The same in Chinese."""
    gib: int
    cores: int
    """Those that compute: four are left to the system."""
    nodes: int
    gb_per_s: int
    """What is read: 85% of the data sheet's number."""
    isa: str
    gpus: int
    gpu: str
    example: str
    """The model whose settings the page shows, as the hub names it; one of benchmarks.plans."""

    def name(self, language: str) -> str:
        """What the machine is."""
        return self.chinese if language == "zh" else self.what

    def machine(self) -> Machine:
        """The machine as `lvllm plan` makes it from the options."""
        given = Description(
            memory_bytes=self.gib * GIB,
            cores=self.cores,
            nodes=self.nodes,
            read_gb_per_s=self.gb_per_s,
            isa=self.isa,
            gpus=self.gpus,
            gpu=self.gpu or None,
        )
        return machine_of(given, _not_here)

    def command(self) -> str:
        """The command that prints the example's plan."""
        cards = f" --gpus {self.gpus} --gpu {self.gpu}" if self.gpus else ""
        return (
            f"    lvllm plan {self.example} --prompt {LOAD.prompt} --answer {LOAD.answer} \\\n"
            f"        --context {LOAD.context} --ram {self.gib}G --cores {self.cores} \\\n"
            f"        --numa {self.nodes} --bandwidth {self.gb_per_s} --isa {self.isa}{cards}\n"
        )


def _not_here() -> Machine:
    raise AssertionError("a recipe describes its whole machine")


RECIPES = {
    "desktop": Recipe(
        "Ryzen 9 9950X, DDR5-5600, 128 GiB, RTX 4090",
        "Ryzen 9 9950X，DDR5-5600，128 GiB，RTX 4090",
        128, 12, 1, 76, "avx512_bf16", 1, "rtx-4090", "openai/gpt-oss-120b",
    ),
    "one-card": Recipe(
        "2 EPYC 9554, 24 channels DDR5-4800, 768 GiB, RTX 4090",
        "两颗 EPYC 9554，24 通道 DDR5-4800，768 GiB，RTX 4090",
        768, 124, 2, 783, "avx512_bf16", 1, "rtx-4090", "deepseek-ai/DeepSeek-R1",
    ),
    "two-cards": Recipe(
        "2 Xeon 8480+, 16 channels DDR5-4800, 1 TiB, 2 RTX 4090",
        "两颗 Xeon 8480+，16 通道 DDR5-4800，1 TiB，两张 RTX 4090",
        1024, 108, 2, 522, "amx", 2, "rtx-4090", "deepseek-ai/DeepSeek-R1",
    ),
    "eight-cards": Recipe(
        "2 EPYC 9554, 24 channels DDR5-4800, 768 GiB, 8 RTX 4090",
        "两颗 EPYC 9554，24 通道 DDR5-4800，768 GiB，八张 RTX 4090",
        768, 124, 2, 783, "avx512_bf16", 8, "rtx-4090", "Qwen/Qwen3-235B-A22B-FP8",
    ),
    "no-card": Recipe(
        "EPYC 9654, 12 channels DDR5-4800, 768 GiB",
        "EPYC 9654，12 通道 DDR5-4800，768 GiB",
        768, 92, 4, 391, "avx512_bf16", 0, "", "Qwen/Qwen3-30B-A3B",
    ),
}  # fmt: skip


@cache
def plan_of(model: str, recipe: Recipe) -> Plan:
    """What the planner says of one of the published models."""
    return choose(shape_of(model), recipe.machine(), LOAD)


def sentence(plan: Plan, language: str = "en") -> tuple[str, ...]:
    """The cells of a table: prefill and decode in tokens a second, and the way."""
    best = plan.best
    if best is None:
        return ("", "", NOT_FIT[language])
    way = WAYS[language].get(best.name, best.name)
    return (f"{best.speed.prefill_rate:.0f}", f"{best.speed.decode_rate:.1f}", way)


def _block(name: str, language: str) -> str:
    """The generated part of a page about one machine."""
    recipe = RECIPES[name]
    rows: list[tuple[str, ...]] = [(MODEL_COLUMN[language], *OTHER_COLUMNS[language])]
    rows += [(model.name, *sentence(plan_of(model.name, recipe), language)) for model in MODELS]
    plan = plan_of(recipe.example.partition("/")[2], recipe)
    if plan.best is None:
        raise SystemExit(f"{recipe.example} does not fit on the machine of {name}")
    chosen = settings_of(plan.model, plan.machine, plan.best)
    settings = as_yaml(recipe.example, chosen)
    return f"\n{table(rows)}\n{recipe.command()}\n```yaml\n{settings}```\n\n"


def filled(text: str, language: str) -> str:
    """A page's text with the current plans between their marks."""
    for name in RECIPES:
        begin, end = BEGIN.format(name), END.format(name)
        if begin in text:
            before, _, rest = text.partition(begin)
            text = before + begin + _block(name, language) + end + rest.partition(end)[2]
    return text
