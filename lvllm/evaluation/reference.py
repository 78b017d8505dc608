"""The run of a reference model, saved to a file that later runs are compared with.

So two models can be compared that take a day each, or that run on different machines.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from lvllm.evaluation.likelihood import Likelihoods
from lvllm.evaluation.passages import Passages

FORMAT = "lvllm eval reference 1"


@dataclass(frozen=True)
class ReferenceRun:
    """The log-probabilities that a reference model gave to the tokens of its passages."""

    name: str
    passages: Passages
    likelihoods: Likelihoods


def save(path: Path, run: ReferenceRun) -> None:
    """Write an .npz file, which takes 8 bytes for each listed token and little else."""
    passages, likelihoods = run.passages, run.likelihoods
    about = {
        "format": FORMAT,
        "name": run.name,
        "source": passages.source,
        "digest": passages.digest,
        "cut": passages.cut,
        "vocabulary": likelihoods.vocabulary,
    }
    with path.open("wb") as file:
        np.savez(
            file,
            about=np.array(json.dumps(about)),
            ids=np.concatenate(passages.ids),
            lengths=np.array([len(ids) for ids in passages.ids]),
            first=np.array(passages.first),
            logprobs=likelihoods.logprobs,
            top_ids=likelihoods.top_ids,
            top_logprobs=likelihoods.top_logprobs,
        )


def load(path: Path) -> ReferenceRun:
    """Read what `save` wrote.

    Raises ValueError if the file holds anything else, OSError if it cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            about = json.loads(str(file["about"]))
            if about["format"] != FORMAT:
                raise ValueError(f"it says {about['format']!r}, wanted {FORMAT!r}")
            ends = np.cumsum(file["lengths"])
            passages = Passages(
                ids=tuple(np.split(file["ids"], ends[:-1])),
                first=tuple(file["first"].tolist()),
                source=about["source"],
                digest=about["digest"],
                cut=about["cut"],
            )
            likelihoods = Likelihoods(
                file["logprobs"], file["top_ids"], file["top_logprobs"], about["vocabulary"]
            )
            return ReferenceRun(about["name"], passages, likelihoods)
    except (ValueError, KeyError, TypeError, BadZipFile, EOFError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is no reference saved by --save: {reason}") from None


def check(run: ReferenceRun, passages: Passages, path: Path) -> None:
    """Raises ValueError, which says what differs, unless the reference read these passages."""
    theirs = run.passages
    if theirs.cut != passages.cut:
        raise ValueError(f"{path} was made with {theirs.cut}; this run has {passages.cut}")
    if theirs.digest != passages.digest:
        raise ValueError(f"{path} was made of another text: {theirs.source} of {run.name}")
    if not theirs.same_ids(passages):
        raise ValueError(
            f"{path} was made with another tokenizer: that of {run.name} makes other tokens of"
            " the same text"
        )
