"""Three ways to get a model's log-probabilities of the tokens of passages.

Each returns the `Likelihoods` of the scored tokens. `top` is how many of the most probable tokens
are listed in each place; there are never more than the vocabulary has.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from lvllm.evaluation.connection import openai_client
from lvllm.evaluation.errors import EvaluationError, server_errors
from lvllm.evaluation.likelihood import Likelihoods
from lvllm.evaluation.passages import Passages

LOGPROBS_OF_A_BATCH = 1 << 22
"""How many log-probabilities a batch of passages may have. vLLM turns each of them into Python
objects of some 110 bytes, so a batch takes at most 0.5 GB.
"""
LOGPROBS_OF_A_PASSAGE = 1 << 24
"""How many log-probabilities a single passage may have: 1.8 GB."""

PassageLogprobs = tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.float32]]
"""Log-probabilities [n - 1] of all tokens of a passage but the first one, then ids and
log-probabilities [n - 1, K] of the most probable tokens in their places.
"""


def _collect(
    passages: Passages,
    read: Iterator[PassageLogprobs],
    vocabulary: int | None,
    name: str,
    shown: bool = True,
) -> Likelihoods:
    """Keep the scored tokens of each passage, and show the progress.

    Raises EvaluationError for values that are not finite.
    """
    parts = []
    console = Console(stderr=True)
    rows = track(read, f"{name}: reading", len(passages.ids), console=console, disable=not shown)
    for number, (first, of_one) in enumerate(zip(passages.first, rows, strict=True)):
        logprobs, top_ids, top_logprobs = (values[first - 1 :] for values in of_one)
        if not np.isfinite(logprobs).all():
            at = int(np.flatnonzero(~np.isfinite(logprobs))[0])
            raise EvaluationError(
                f"{name} gives a log-probability of {logprobs[at]} to token {first + at} of"
                f" passage {number}"
            )
        parts.append((logprobs, top_ids, top_logprobs))
    logprobs, top_ids, top_logprobs = (
        np.concatenate(of_all) for of_all in zip(*parts, strict=True)
    )
    return Likelihoods(logprobs, top_ids, top_logprobs, vocabulary)


def logprobs_from_vllm(
    passages: Passages, llm: Any, top: int, *, name: str = "model"
) -> Likelihoods:
    """Ask a `vllm.LLM` in this process, whose `max_logprobs` must allow `top`."""
    from vllm import SamplingParams

    vocabulary = llm.model_config.get_vocab_size()
    width = min(top, vocabulary)
    sampling = SamplingParams(
        temperature=0.0, max_tokens=1, prompt_logprobs=width, flat_logprobs=True, detokenize=False
    )
    step = max(1, LOGPROBS_OF_A_BATCH // (passages.longest * (width + 1)))

    def read() -> Iterator[PassageLogprobs]:
        for start in range(0, len(passages.ids), step):
            prompts: list[Any] = [
                {"prompt_token_ids": ids.tolist()} for ids in passages.ids[start : start + step]
            ]
            for output in llm.generate(prompts, sampling, use_tqdm=False):
                flat: Any = output.prompt_logprobs
                # Each row begins with the passage's own token, whatever its rank is.
                ids = np.array(flat.token_ids, dtype=np.int32).reshape(-1, width + 1)
                values = np.array(flat.logprobs, dtype=np.float32).reshape(-1, width + 1)
                yield values[:, 0], ids[:, 1:], values[:, 1:]

    return _collect(passages, read(), vocabulary, name)


def logprobs_from_server(
    passages: Passages,
    base_url: str,
    top: int,
    *,
    model: str,
    api_key: str = "",
    concurrency: int = 8,
    shown: bool = True,
) -> Likelihoods:
    """Ask a vLLM server for the `prompt_logprobs` of completions.

    `top` is limited by the server's `--max-logprobs`, which is 20 unless set. Progress is printed
    if it is to be `shown`. Raises
    EvaluationError if the server cannot be reached, refuses, or is not vLLM.
    """
    client = openai_client(base_url, api_key)

    def read(ids: NDArray[np.int32]) -> PassageLogprobs:
        completion = client.completions.create(
            model=model,
            prompt=ids.tolist(),
            max_tokens=1,
            temperature=0.0,
            extra_body={"prompt_logprobs": top},
        )
        rows = getattr(completion.choices[0], "prompt_logprobs", None)
        if not rows:
            raise EvaluationError(f"{base_url} gives no prompt_logprobs: it is no vLLM server")
        own = [row[str(token)]["logprob"] for row, token in zip(rows[1:], ids[1:], strict=True)]
        # A row has the `top` most probable tokens, and the passage's own token if it is not one of
        # them; then its rank is beyond `top`.
        tops = [sorted(row.items(), key=lambda item: item[1]["rank"])[:top] for row in rows[1:]]
        return (
            np.array(own, dtype=np.float32),
            np.array([[int(token) for token, _ in row] for row in tops], dtype=np.int32),
            np.array([[value["logprob"] for _, value in row] for row in tops], dtype=np.float32),
        )

    with (
        server_errors(base_url, "refused a passage"),
        ThreadPoolExecutor(concurrency) as pool,
    ):
        return _collect(passages, pool.map(read, passages.ids), None, model, shown)


def logprobs_from_transformers(
    passages: Passages,
    model: Path | str,
    top: int,
    *,
    dtype: str = "bfloat16",
    network: Any = None,
) -> Likelihoods:
    """Ask Hugging Face transformers on the CPU, the reference for the other two ways.

    `network` is the model if it is loaded already.
    """
    import torch
    from transformers import AutoModelForCausalLM

    network = network or AutoModelForCausalLM.from_pretrained(model, dtype=dtype)

    vocabulary = network.config.vocab_size
    step = max(1, LOGPROBS_OF_A_BATCH // (passages.longest * vocabulary))

    def read() -> Iterator[PassageLogprobs]:
        for start in range(0, len(passages.ids), step):
            batch = [torch.from_numpy(ids).long() for ids in passages.ids[start : start + step]]
            # What is behind the end of a passage has no effect on it.
            padded = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
            with torch.no_grad():
                all_logits = network(input_ids=padded, use_cache=False).logits
            for tokens, logits in zip(batch, all_logits, strict=True):
                logprobs = torch.log_softmax(logits[: len(tokens) - 1].float(), dim=-1)
                best = logprobs.topk(min(top, vocabulary))
                own = logprobs.gather(1, tokens[1:, None]).squeeze(1)
                yield own.numpy(), best.indices.int().numpy(), best.values.numpy()

    return _collect(passages, read(), vocabulary, str(model))
