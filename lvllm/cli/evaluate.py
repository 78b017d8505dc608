"""`lvllm eval`: the exact-match score of a model on held-out questions."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from lvllm import evaluation
from lvllm.evaluation.questions import TINY_MOE


def evaluate(
    model: Annotated[
        str, typer.Argument(help="A checkpoint, or with --server the served name.")
    ] = "",
    questions: Annotated[
        Path,
        typer.Option(
            help="Questions, one JSON object a line.", show_default="the demo model's 500"
        ),
    ] = TINY_MOE,
    server: Annotated[
        str, typer.Option(help="Ask this OpenAI-compatible server (http://host:port/v1).")
    ] = "",
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16.")] = "bfloat16",
    wrong: Annotated[int, typer.Option(help="How many wrong answers to print.")] = 5,
) -> None:
    """Ask MODEL the questions, greedily, and print the share of right answers by task.

    Without --server the model runs in this process through vLLM, with LvLLM if
    LVLLM_MOE_NUMA_ENABLED=1.
    """
    if not model and not server:
        raise SystemExit("lvllm: give a MODEL folder, or --server URL to ask one that runs")
    try:
        asked = evaluation.load_questions(questions)
        if server:
            answers = evaluation.ask_server(asked, server, model=model or None)
        else:
            answers = evaluation.ask_vllm(asked, _load(model, dtype))
    except (ValueError, OSError, evaluation.EvaluationError) as error:
        raise SystemExit(f"lvllm: {error}") from None
    _report(evaluation.score(asked, answers), wrong)


def _load(model: str, dtype: str):  # type: ignore[no-untyped-def]
    from vllm import LLM

    if not (Path(model) / "config.json").exists():
        raise ValueError(f"{model!r} is no checkpoint folder: it has no config.json")
    return LLM(
        model=model,
        dtype=dtype,
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=64,
        kv_cache_memory_bytes=1 << 28,
        disable_log_stats=True,
    )


def _report(result: evaluation.Result, wrong: int) -> None:
    table = Table("task", "right", "of", "exact match")
    for task, tally in (*result.by_task.items(), ("all", result.total)):
        table.add_row(task, str(tally.right), str(tally.asked), f"{tally.accuracy:.1%}")
    console = Console()
    for question, answer in result.wrong[:wrong]:
        console.print(f"{question.question!r}: {answer!r}, right is {question.answer!r}")
    console.print(table)
