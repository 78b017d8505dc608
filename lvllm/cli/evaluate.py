"""`lvllm eval` measures how good a model is, and how far it is from another."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from lvllm import engine, evaluation
from lvllm.checkpoint.gguf_headers import is_gguf
from lvllm.cli.chat import ApiKey
from lvllm.evaluation import measure, passages, report
from lvllm.evaluation import reference as reference_runs
from lvllm.evaluation.likelihood import check_vocabularies
from lvllm.evaluation.models import FORMATS, LocalModel, Model, ServedModel
from lvllm.evaluation.processes import Work
from lvllm.evaluation.questions import TINY_MOE
from lvllm.evaluation.reference import ReferenceRun
from lvllm.settings import variables

TOP = 512
SERVED_TOP = 20  # What a vLLM server allows unless --max-logprobs says otherwise.


def evaluate(
    model: Annotated[
        str,
        typer.Argument(help="A checkpoint folder, a GGUF file, or with --server the served name."),
    ] = "",
    questions: Annotated[
        Path | None,
        typer.Option(
            help="A file of questions, one JSON object in each line.",
            show_default="the demo model's 500, unless --text is given",
        ),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="A UTF-8 text whose likelihood is measured.")
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens in a window of the text.")] = 512,
    stride: Annotated[
        int | None,
        typer.Option(
            help="How many tokens a window begins after the one before it.",
            show_default="half of --context",
        ),
    ] = None,
    reference: Annotated[
        str,
        typer.Option(
            help="Compare with this checkpoint folder or GGUF file, or with a run that --save has"
            " saved."
        ),
    ] = "",
    save: Annotated[
        Path | None, typer.Option(help="Save this run in an .npz file, for a later --reference.")
    ] = None,
    formats: Annotated[
        str,
        typer.Option(
            help="Measure MODEL in formats of LvLLM's engine, and compare each with MODEL as it is:"
            f" all, or some of {','.join(FORMATS)}."
        ),
    ] = "",
    top: Annotated[
        int | None,
        typer.Option(
            help="How many of the most probable tokens are compared; all of them is exact.",
            show_default=f"{TOP}; with --server {SERVED_TOP}",
        ),
    ] = None,
    server: Annotated[
        str, typer.Option(help="Ask this OpenAI-compatible server: http://host:port/v1.")
    ] = "",
    api_key: ApiKey = "",
    tokenizer: Annotated[
        str,
        typer.Option(
            help="Take the tokenizer of this folder or id on the hub, in the place of MODEL's."
        ),
    ] = "",
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16.")] = "bfloat16",
    markdown: Annotated[
        list[Path] | None,
        typer.Option(
            help=f"Write the table into this page, after the line {report.BEGIN};"
            " may be given several times."
        ),
    ] = None,
    wrong: Annotated[int, typer.Option(help="How many wrong answers to print.")] = 5,
) -> None:
    """Ask MODEL questions and print the share of right answers. With --text, measure the mean
    negative log-likelihood of a token. With --reference or --formats, compare models.

    A comparison without --text reads the questions with their right answers. Without --server the
    model runs in vLLM, with LvLLM if LVLLM_MOE_NUMA_ENABLED=1; --formats always uses LvLLM.
    """
    console = Console()
    rows: list[report.Row] = []
    try:
        _check(model, server, reference, save, formats, markdown or [], top, tokenizer)
        asked = evaluation.load_questions(questions or TINY_MOE) if questions or not text else []
        tested: Model
        if server:
            tested = ServedModel(server, model, api_key)
        else:
            tested = LocalModel(model, dtype, _name(model), own_tokenizer=tokenizer or None)

        def cut(tokenizer: passages.Tokenizer) -> passages.Passages:
            if text:
                return passages.of_text(
                    text, tokenizer, context, context // 2 if stride is None else stride
                )
            return passages.of_chats(asked, tokenizer)

        read = cut(tested.tokenizer()) if text or reference or save or formats else None
        saved: ReferenceRun | None = None
        models: list[Model] = [tested]
        if formats:
            named = FORMATS if formats == "all" else formats.split(",")
            models = measure.in_formats(model, dtype, named, tokenizer or None)
        elif reference and read:
            saved, models = _reference(reference, dtype, tested, read, cut)
        width = saved.likelihoods.top_ids.shape[1] if saved else top
        width = width or (SERVED_TOP if server else TOP if reference or save or formats else 1)
        work = Work(asked, read, width)
        for each in models:
            each.check(work)
        for row in measure.measure(models, work, saved):
            rows.append(row)
        if save and read and rows[-1].likelihoods:
            reference_runs.save(save, ReferenceRun(rows[-1].name, read, rows[-1].likelihoods))
        about = report.notes(rows, read.source if read else "", rows[0].name)
        if not server and (models[-1].on_lvllm or variables.enabled(os.environ)):
            about.append(f"Experts on LvLLM's engine ({engine.info().isa}).")
        for page in markdown or []:
            report.write_page(page, report.markdown(rows, about))
    except (ValueError, OSError, evaluation.EvaluationError) as error:
        if rows:  # They may have taken hours.
            console.print(report.table(rows))
        raise SystemExit(f"lvllm: {error}") from None
    if len(models) == 1 and rows[-1].result:
        _by_task(rows[-1].result, wrong, console)
    if len(rows) > 1 or read:
        console.print(report.table(rows))
        for line in about:
            console.print(line, soft_wrap=True, highlight=False)


def _check(
    model: str,
    server: str,
    reference: str,
    save: Path | None,
    formats: str,
    markdown: Sequence[Path],
    top: int | None,
    tokenizer: str,
) -> None:
    """Raises ValueError for options that do not go together, before anything slow begins."""
    if not model and not server:
        raise ValueError("give a MODEL folder, or --server URL to ask one that runs")
    if formats and (server or reference or save):
        other = "--server" if server else "--reference" if reference else "--save"
        raise ValueError(f"--formats compares MODEL with itself: leave {other} out")
    if tokenizer and server:
        raise ValueError("--tokenizer is for a MODEL that runs here: a server has its own")
    if save and reference:
        raise ValueError("--save is for the run of a reference: leave --reference out")
    if save and (save.exists() or not save.parent.is_dir()):
        reason = "exists already" if save.exists() else f"{save.parent} is no folder"
        raise ValueError(f"--save {save}: {reason}")
    if top is not None and top < 1:
        raise ValueError(f"--top {top} is not allowed: at least 1")
    if top is not None and Path(reference).is_file() and not is_gguf(Path(reference)):
        raise ValueError(f"--top {top}: a saved reference has its own; leave it out")
    for page in markdown:
        report.split_page(page)


def _reference(
    reference: str,
    dtype: str,
    tested: Model,
    read: passages.Passages,
    cut: Callable[[passages.Tokenizer], passages.Passages],
) -> tuple[ReferenceRun | None, list[Model]]:
    """The saved run that --reference names, or None, and the models to measure.

    If --reference names a checkpoint, that is the first of the models.
    """
    path = Path(reference)
    if path.is_file() and not is_gguf(path):
        run = reference_runs.load(path)
        reference_runs.check(run, read, path)
        check_vocabularies(run.likelihoods.vocabulary, tested.vocabulary())
        return run, [tested]
    if not path.exists():
        raise ValueError(f"--reference {reference!r} is no checkpoint folder and no saved run")
    first = LocalModel(reference, dtype, _name(reference))
    measure.check_reference(first, tested, cut(first.tokenizer()), read)
    return None, [first, tested]


def _name(model: str) -> str:
    return Path(model).resolve().name


def _by_task(result: evaluation.Result, wrong: int, console: Console) -> None:
    table = Table("task", "right", "of", "exact match")
    for task, tally in (*result.by_task.items(), ("all", result.total)):
        table.add_row(task, str(tally.right), str(tally.asked), f"{tally.accuracy:.1%}")
    for question, answer in result.wrong[:wrong]:
        console.print(f"{question.question!r}: {answer!r}, right is {question.answer!r}")
    console.print(table)
