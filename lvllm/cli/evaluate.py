"""`lvllm eval`: how good a model is, and how far from another."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from lvllm import engine, evaluation
from lvllm.evaluation import measure, passages, report, saved
from lvllm.evaluation.likelihood import check_vocabularies
from lvllm.evaluation.processes import Work
from lvllm.evaluation.questions import TINY_MOE
from lvllm.evaluation.subjects import FORMATS, Checkpoint, Server, Subject
from lvllm.settings import variables

TOP = 512
SERVED_TOP = 20  # what a vLLM server allows unless told otherwise


def evaluate(
    model: Annotated[
        str, typer.Argument(help="A checkpoint, or with --server the served name.")
    ] = "",
    questions: Annotated[
        Path | None,
        typer.Option(
            help="Questions, one JSON object a line.",
            show_default="the demo model's 500, unless --text is given",
        ),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="A UTF-8 text to be read for its likelihood.")
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens of a window of the text.")] = 512,
    stride: Annotated[
        int | None,
        typer.Option(
            help="A window begins every so many tokens and scores the new ones.",
            show_default="half of --context",
        ),
    ] = None,
    reference: Annotated[
        str,
        typer.Option(help="Compare with this checkpoint, or with a run that --save has saved."),
    ] = "",
    save: Annotated[
        Path | None, typer.Option(help="Save the run, to be a --reference later (.npz).")
    ] = None,
    formats: Annotated[
        str,
        typer.Option(
            help="Measure MODEL in these formats of LvLLM's engine and compare with MODEL as it"
            f" is: all, or some of {','.join(FORMATS)}."
        ),
    ] = "",
    top: Annotated[
        int | None,
        typer.Option(
            help="How many of the most probable tokens a comparison goes by; exact if all.",
            show_default=f"{TOP}; with --server {SERVED_TOP}",
        ),
    ] = None,
    server: Annotated[
        str, typer.Option(help="Ask this OpenAI-compatible server (http://host:port/v1).")
    ] = "",
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16.")] = "bfloat16",
    markdown: Annotated[
        Path | None,
        typer.Option(help=f"Write the table into this page, between {report.BEGIN} and its end."),
    ] = None,
    wrong: Annotated[int, typer.Option(help="How many wrong answers to print.")] = 5,
) -> None:
    """Ask MODEL questions, greedily, and print the share of right answers; read it a text, and
    print the mean negative log-likelihood of a token; compare it with a reference.

    A comparison without --text goes over the questions with their right answers. Without --server
    the model runs through vLLM, with LvLLM if LVLLM_MOE_NUMA_ENABLED=1; --formats always has LvLLM.
    """
    console = Console()
    rows: list[report.Row] = []
    try:
        _check(model, server, reference, save, formats, markdown, top)
        asked = evaluation.load_questions(questions or TINY_MOE) if questions or not text else []
        subject: Subject
        subject = Server(server, model) if server else Checkpoint(model, dtype, _name(model))

        def cut(tokenizer: passages.Tokenizer) -> passages.Passages:
            if text:
                return passages.of_text(
                    text, tokenizer, context, context // 2 if stride is None else stride
                )
            return passages.of_chats(asked, tokenizer)

        read = cut(subject.tokenizer()) if text or reference or save or formats else None
        kept: saved.Saved | None = None
        subjects: list[Subject] = [subject]
        if formats:
            named = FORMATS if formats == "all" else formats.split(",")
            subjects = measure.in_formats(model, dtype, named)
        elif reference and read:
            kept, subjects = _reference(reference, dtype, subject, read, cut)
        width = kept.likelihoods.top_ids.shape[1] if kept else top
        width = width or (SERVED_TOP if server else TOP if reference or save or formats else 1)
        work = Work(asked, read, width)
        for one in subjects:
            one.check(work)
        for row in measure.measure(subjects, work, kept):
            rows.append(row)
        if save and read and rows[-1].likelihoods:
            saved.save(save, saved.Saved(rows[-1].name, read, rows[-1].likelihoods))
        about = report.notes(rows, read.source if read else "", rows[0].name)
        if not server and (formats or variables.enabled(os.environ)):
            about.append(f"Experts on LvLLM's engine ({engine.info().isa}).")
        if markdown:
            report.write_page(markdown, report.markdown(rows, about))
    except (ValueError, OSError, evaluation.EvaluationError) as error:
        if rows:  # they may have taken hours
            console.print(report.table(rows))
        raise SystemExit(f"lvllm: {error}") from None
    if len(subjects) == 1 and rows[-1].result:
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
    markdown: Path | None,
    top: int | None,
) -> None:
    """Raises ValueError for options that do not go together, before anything slow."""
    if not model and not server:
        raise ValueError("give a MODEL folder, or --server URL to ask one that runs")
    if formats and (server or reference or save):
        other = "--server" if server else "--reference" if reference else "--save"
        raise ValueError(f"--formats compares MODEL with itself: leave {other} out")
    if save and reference:
        raise ValueError("--save is for the run of a reference: leave --reference out")
    if save and (save.exists() or not save.parent.is_dir()):
        reason = "exists already" if save.exists() else f"{save.parent} is no folder"
        raise ValueError(f"--save {save}: {reason}")
    if top is not None and top < 1:
        raise ValueError(f"--top {top} is not allowed: at least 1")
    if top is not None and Path(reference).is_file():
        raise ValueError(f"--top {top}: a saved reference has its own; leave it out")
    if markdown:
        report.split_page(markdown)


def _reference(
    reference: str,
    dtype: str,
    subject: Subject,
    read: passages.Passages,
    cut: Callable[[passages.Tokenizer], passages.Passages],
) -> tuple[saved.Saved | None, list[Subject]]:
    """A saved reference or none, and what is to be measured, a reference first."""
    path = Path(reference)
    if path.is_file():
        kept = saved.load(path)
        saved.check(kept, read, path)
        check_vocabularies(kept.likelihoods.vocabulary, subject.vocabulary())
        return kept, [subject]
    if not path.is_dir():
        raise ValueError(f"--reference {reference!r} is no checkpoint folder and no saved run")
    first = Checkpoint(reference, dtype, _name(reference))
    measure.check_reference(first, subject, cut(first.tokenizer()), read)
    return None, [first, subject]


def _name(model: str) -> str:
    return Path(model).resolve().name


def _by_task(result: evaluation.Result, wrong: int, console: Console) -> None:
    table = Table("task", "right", "of", "exact match")
    for task, tally in (*result.by_task.items(), ("all", result.total)):
        table.add_row(task, str(tally.right), str(tally.asked), f"{tally.accuracy:.1%}")
    for question, answer in result.wrong[:wrong]:
        console.print(f"{question.question!r}: {answer!r}, right is {question.answer!r}")
    console.print(table)
