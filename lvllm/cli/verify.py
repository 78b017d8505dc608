"""`lvllm verify`: prove that the engine computes what a model's weights say."""

import json
import os
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lvllm.errors import LvllmError
from lvllm.evaluation.errors import EvaluationError
from lvllm.evaluation.processes import run_in_new_process
from lvllm.verifying.model import LayerReport


def verify(
    model: Annotated[str, typer.Argument(help="A folder, a GGUF file, or an id on the hub.")],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON: a list of lvllm.verifying LayerReport.")
    ] = False,
) -> None:
    """Compare each layer's experts with plain PyTorch in float32, and look at all weights.

    Four experts of each layer are multiplied on every instruction set that this CPU has, with
    batches of several sizes. Damage in weights is what no training writes: NaN, zeros, an expert or
    a row whose size is far from its siblings'. docs/verify.md says more.

    The exit code is 0 if nothing is wrong, and 1 if something is.
    """
    try:
        found = run_in_new_process(model, load_and_verify, model)
    except LvllmError as error:
        raise SystemExit(f"lvllm: {error}") from None
    reports = [LayerReport.model_validate_json(text) for text in found]
    wrong = [report.wrong for report in reports if report.wrong is not None]
    if as_json:
        print(json.dumps([report.model_dump() for report in reports], indent=2))
    else:
        Console().print(_table(reports))
        for line in wrong:
            print(line)
        print(_summary(reports, len(wrong)))
    sys.stdout.flush()
    raise typer.Exit(1 if wrong else 0)


def load_and_verify(model: str) -> list[str]:
    """Load a model and verify its layers, on all ranks. To be called in a process of its own.

    Returns a LayerReport of each layer as JSON.
    """
    os.environ["LVLLM_MOE_NUMA_ENABLED"] = "1"
    from vllm import LLM

    llm = LLM(
        model=model,
        skip_tokenizer_init=True,  # GGUF files may have none that can be read.
        enforce_eager=True,
        max_model_len=128,  # No text is computed, and test models have short contexts.
        max_num_seqs=1,
        kv_cache_memory_bytes=1 << 28,
        language_model_only=True,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    found: list[str] = []
    if llm.model_config.get_num_experts():  # or vLLM's own worker has no such method
        of_ranks: list[Any] = llm.collective_rpc("verify_experts")
        found = [text for texts in of_ranks for text in texts]
    if not found:
        raise EvaluationError("the model has no layer whose experts the engine computes")
    return found


def _table(reports: list[LayerReport]) -> Table:
    compared = any(report.from_file is not None for report in reports)
    table = Table("layer", "format", "worst error", "allowed", "with", "weights")
    if compared:
        table.add_column("from the file's")
    table.columns[0].overflow = "fold"
    for report in reports:
        worst = report.worst
        table.add_row(
            report.name,
            report.format,
            f"{worst.error:.1e}",
            f"{worst.bound:.1e}",
            f"{worst.isa}, {worst.tokens} tokens",
            f"{len(report.damages)} damaged" if report.damages else "sound",
            *(["" if report.from_file is None else f"{report.from_file:.1e}"] * compared),
        )
    return table


def _summary(reports: list[LayerReport], wrong: int) -> str:
    isas = sorted({one.isa for report in reports for one in report.products})
    said = f"{wrong} of {len(reports)} layers are wrong" if wrong else "Nothing is wrong"
    return f"{said}: {len(reports)} layers on {', '.join(isas)}."
