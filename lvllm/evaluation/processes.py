"""Run models in vLLM one after the other, each in a process of its own.

When the process ends, all its memory is free again. The processes are forked from one that has
imported vLLM and done nothing else, so a model of 7 MB starts in 3 s instead of 20.
"""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from typing import ParamSpec, TypeVar

from lvllm.evaluation.answers import ask_vllm
from lvllm.evaluation.errors import EvaluationError
from lvllm.evaluation.likelihood import Likelihoods
from lvllm.evaluation.logprobs import logprobs_from_vllm
from lvllm.evaluation.passages import Passages
from lvllm.evaluation.questions import Question

QUESTION_TOKENS = 512
"""Room for a question with its answer, in tokens."""
KV_BYTES_OF_A_TOKEN = 512 << 10
"""Room in the KV cache for a token. A large model, 80 layers with 8 heads of 128, takes 320 KiB."""

DEFAULTS = {
    # The start of a model logs some 60 lines; only errors are to stand beside the tables.
    "VLLM_LOGGING_LEVEL": "ERROR",
    # vLLM compiles a small function for log-probabilities, which needs g++ and 10 s of it.
    "TORCHDYNAMO_DISABLE": "1",
    # Each model is in a process of its own already.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
"""Environment variables that the new processes get, unless the environment sets them already."""

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Work:
    """What a model is to do: answer questions, read passages.

    `top` is how many of the most probable tokens are listed in each place of the passages.
    """

    questions: Sequence[Question] = ()
    passages: Passages | None = None
    top: int = 1


@dataclass(frozen=True)
class Outcome:
    """What a model did: one answer for each question, and the likelihoods of the passages."""

    answers: Sequence[str] = ()
    likelihoods: Likelihoods | None = None


def run_in_new_process(what: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call `function` in a new process, which must be able to import it by its name.

    Any error there is raised here as an EvaluationError, in one line that begins with `what`. Only
    SystemExit stays what it is.
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
    os.dup2(2, 1)  # Standard output is for the tables.
    # The process that this one is forked from has the variables of the first call, and they may
    # have changed since.
    os.environ.clear()
    os.environ.update(environment)
    try:
        return function()
    except EvaluationError:
        raise
    except Exception as error:  # Its class may need vLLM to be unpickled, or not be picklable.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise EvaluationError(f"{what}: {reason}") from None


def run_vllm(
    model: str, dtype: str, work: Work, name: str, lvllm: bool, tokenizer: str | None = None
) -> Outcome:
    """Load the checkpoint `model` and do the work. This is to be called in a process of its own.

    Progress is shown under `name`. `lvllm` turns LvLLM on, whatever the environment says.
    `tokenizer` names another tokenizer than the model's.
    """
    if lvllm:
        os.environ["LVLLM_MOE_NUMA_ENABLED"] = "1"
    from vllm import LLM

    length = work.passages.longest + 1 if work.passages else 0
    if work.questions:
        length = max(length, QUESTION_TOKENS)
    llm = LLM(
        model=model,
        tokenizer=tokenizer,
        dtype=dtype,  # type: ignore[arg-type]
        enforce_eager=True,
        max_model_len=length,
        max_num_seqs=64,
        max_logprobs=-1,
        language_model_only=True,  # There are no pictures in any question.
        kv_cache_memory_bytes=KV_BYTES_OF_A_TOKEN * max(length, QUESTION_TOKENS),
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    answers = ask_vllm(work.questions, llm) if work.questions else []
    likelihoods = None
    if work.passages:
        likelihoods = logprobs_from_vllm(work.passages, llm, work.top, name=name)
    return Outcome(answers, likelihoods)
