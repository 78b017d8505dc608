"""One model after the other through vLLM, each in a process that gives all its memory back.

The processes are forked from one that has imported vLLM and nothing more: a model of 7 MB then
starts in 3 s instead of 20.
"""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from typing import ParamSpec, TypeVar

from lvllm.evaluation.backends import EvaluationError, ask_vllm
from lvllm.evaluation.likelihood import Likelihoods
from lvllm.evaluation.passages import Passages
from lvllm.evaluation.questions import Question
from lvllm.evaluation.readers import read_vllm

QUESTION_TOKENS = 512  # of a question with its answer
# Of keys and values a token: 80 layers with 8 heads of 128 take 320 KiB.
CACHE_BYTES = 512 << 10

DEFAULTS = {
    # Only errors and the tables: a model's start logs some 60 lines.
    "VLLM_LOGGING_LEVEL": "ERROR",
    # Asked for log-probabilities, vLLM compiles a small function: 10 s of g++, and g++.
    "TORCHDYNAMO_DISABLE": "1",
    # A model's process is one of its own already.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
"""Variables of the new processes, unless the environment has them."""

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Work:
    """What a model is to do."""

    questions: Sequence[Question] = ()
    passages: Passages | None = None
    top: int = 1


@dataclass(frozen=True)
class Outcome:
    """What it did: an answer a question, and what it made of the passages."""

    answers: Sequence[str] = ()
    likelihoods: Likelihoods | None = None


def run_apart(what: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`function`, which has a name to be imported by, in a new process.

    Raises EvaluationError in one line that begins with `what`, for any error; SystemExit passes.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lvllm.evaluation.preload"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            call = partial(function, *args, **kwargs)
            return pool.submit(_call, what, DEFAULTS | dict(os.environ), call).result()
        except BrokenProcessPool:
            raise EvaluationError(
                f"{what}: its process was killed; most likely memory ran out"
            ) from None


def _call(what: str, environment: dict[str, str], function: Callable[[], T]) -> T:
    os.dup2(2, 1)  # standard output is for the tables
    # The process has the variables of the first call; they may have changed.
    os.environ.clear()
    os.environ.update(environment)
    try:
        return function()
    except EvaluationError:
        raise
    except Exception as error:  # of a class that may need vLLM, or not reach the caller at all
        reason = " ".join(str(error).split()) or type(error).__name__
        raise EvaluationError(f"{what}: {reason}") from None


def run_vllm(model: str, dtype: str, work: Work, name: str, lvllm: bool) -> Outcome:
    """Loads the checkpoint `model` and does the work. For a process of its own.

    `name` is what progress is shown under; `lvllm` turns LvLLM on whatever the environment says.
    """
    if lvllm:
        os.environ["LVLLM_MOE_NUMA_ENABLED"] = "1"
    from vllm import LLM

    length = work.passages.longest + 1 if work.passages else 0
    if work.questions:
        length = max(length, QUESTION_TOKENS)
    llm = LLM(
        model=model,
        dtype=dtype,  # type: ignore[arg-type]
        enforce_eager=True,
        max_model_len=length,
        max_num_seqs=64,
        max_logprobs=-1,
        language_model_only=True,  # nobody shows it pictures
        kv_cache_memory_bytes=CACHE_BYTES * max(length, QUESTION_TOKENS),
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    answers = ask_vllm(work.questions, llm) if work.questions else []
    likelihoods = None
    if work.passages:
        likelihoods = read_vllm(work.passages, llm, work.top, name=name)
    return Outcome(answers, likelihoods)
