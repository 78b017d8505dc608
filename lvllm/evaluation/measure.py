"""Several models measured one after the other, and compared with the first of them."""

from collections.abc import Iterator, Sequence

from lvllm.evaluation.likelihood import check_vocabularies, compare
from lvllm.evaluation.passages import Passages
from lvllm.evaluation.processes import Work
from lvllm.evaluation.report import Row
from lvllm.evaluation.saved import Saved
from lvllm.evaluation.scoring import score
from lvllm.evaluation.subjects import DTYPES, FORMATS, Checkpoint, Exported, Subject


def measure(subjects: Sequence[Subject], work: Work, saved: Saved | None = None) -> Iterator[Row]:
    """A row for each subject, as it is done. The reference is `saved`, or else the first subject.

    Raises EvaluationError if one cannot be measured, ValueError if it cannot be compared.
    """
    reference = saved.likelihoods if saved else None
    if saved:
        yield Row(saved.name, likelihoods=reference)
    for subject in subjects:
        measured = subject.measure(work)
        outcome = measured.outcome
        likelihoods = outcome.likelihoods
        comparison = compare(reference, likelihoods) if reference and likelihoods else None
        reference = reference or likelihoods
        result = score(work.questions, outcome.answers) if work.questions else None
        yield Row(subject.name, measured.expert_bytes, result, likelihoods, comparison)


def in_formats(model: str, dtype: str, formats: Sequence[str]) -> list[Subject]:
    """The checkpoint as it is, then in each other format of `formats`, all through LvLLM.

    Raises ValueError for an unknown format and for a checkpoint that is quantised already.
    """
    if unknown := [name for name in formats if name not in FORMATS]:
        raise ValueError(f"--formats {unknown[0]!r} is not allowed: all, or {', '.join(FORMATS)}")
    name = next((name for name, of in DTYPES.items() if of == dtype), None)
    if name is None:
        raise ValueError(f"--dtype {dtype!r} is not allowed: {' or '.join(DTYPES.values())}")
    plain = Checkpoint(model, dtype, name, lvllm=True)
    if stored := plain.quantization():
        raise ValueError(
            f"{model} is quantised already ({stored}): formats are made of one that is not"
        )
    return [
        plain,
        *(
            Checkpoint(model, DTYPES[format], format, lvllm=True)
            if format in DTYPES
            else Exported(plain, format)
            for format in dict.fromkeys(formats)
            if format != name
        ),
    ]


def check_reference(
    reference: Checkpoint, model: Subject, theirs: Passages, ours: Passages
) -> None:
    """Raises ValueError unless both make the same tokens of the text, of one vocabulary."""
    if not theirs.same_ids(ours):
        raise ValueError(
            f"{reference.name} makes other tokens of the text than {model.name}: a reference has"
            " the model's own tokenizer"
        )
    check_vocabularies(reference.vocabulary(), model.vocabulary())
