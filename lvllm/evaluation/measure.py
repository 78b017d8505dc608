"""Measure several models one after the other, and compare each with a reference."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from lvllm.evaluation.likelihood import check_vocabularies, compare
from lvllm.evaluation.models import DTYPES, FORMATS, ExportedModel, LocalModel, Model
from lvllm.evaluation.passages import Passages
from lvllm.evaluation.processes import Work
from lvllm.evaluation.reference import ReferenceRun
from lvllm.evaluation.report import Row
from lvllm.evaluation.scoring import score


def measure(
    models: Sequence[Model], work: Work, saved: ReferenceRun | None = None
) -> Iterator[Row]:
    """Yield a row of the table for each model when it is measured.

    Models are compared with the `saved` run, or without one with the first model. Raises
    EvaluationError if a model cannot be measured, ValueError if it cannot be compared.
    """
    reference = saved.likelihoods if saved else None
    if saved:
        yield Row(saved.name, likelihoods=reference)
    for model in models:
        measured = model.measure(work)
        outcome = measured.outcome
        likelihoods = outcome.likelihoods
        comparison = compare(reference, likelihoods) if reference and likelihoods else None
        reference = reference or likelihoods
        result = score(work.questions, outcome.answers) if work.questions else None
        yield Row(model.name, measured.expert_bytes, result, likelihoods, comparison)


def in_formats(
    model: str, dtype: str, formats: Sequence[str], tokenizer: str | None = None
) -> list[Model]:
    """The checkpoint `model` as it is, then in each other format of `formats`, all with LvLLM.

    Raises ValueError for an unknown format and for a checkpoint that is quantised already.
    """
    if unknown := [name for name in formats if name not in FORMATS]:
        raise ValueError(f"--formats {unknown[0]!r} is not allowed: all, or {', '.join(FORMATS)}")
    name = next((name for name, of in DTYPES.items() if of == dtype), None)
    if name is None:
        raise ValueError(f"--dtype {dtype!r} is not allowed: {' or '.join(DTYPES.values())}")
    plain = LocalModel(model, dtype, name, lvllm=True, own_tokenizer=tokenizer)
    if stored := plain.quantization():
        raise ValueError(
            f"{model} is quantised already ({stored}): formats are made of one that is not"
        )
    return [
        plain,
        *(
            replace(plain, dtype=DTYPES[format], name=format)
            if format in DTYPES
            else ExportedModel(plain, format)
            for format in dict.fromkeys(formats)
            if format != name
        ),
    ]


def check_reference(reference: LocalModel, model: Model, theirs: Passages, ours: Passages) -> None:
    """Raises ValueError unless both have the same tokens of the text and one vocabulary size."""
    if not theirs.same_ids(ours):
        raise ValueError(
            f"{reference.name} makes other tokens of the text than {model.name}: a reference has"
            " the model's own tokenizer"
        )
    check_vocabularies(reference.vocabulary(), model.vocabulary())
