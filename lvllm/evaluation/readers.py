"""Three ways to have a model read passages. Each returns the likelihoods of the scored tokens.

`top` is how many of the most probable tokens are listed in each place, at most the vocabulary.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from lvllm.evaluation.backends import EvaluationError
from lvllm.evaluation.likelihood import Likelihoods
from lvllm.evaluation.passages import Passages

if TYPE_CHECKING:
    from vllm import LLM

# vLLM turns each log-probability that it returns into Python objects of some 110 bytes in all: as
# many passages are read at a time as stay below 0.5 GB of them.
AT_A_TIME = 1 << 22
# Of one passage at most this many: 1.8 GB.
MOST = 1 << 24

# One passage: log-probabilities [n - 1] of its tokens but the first, then ids and log-probabilities
# [n - 1, K] of the most probable ones in their places.
Read = tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.float32]]


def _collect(
    passages: Passages, read: Iterator[Read], vocabulary: int | None, name: str
) -> Likelihoods:
    """Of each passage what is scored. Raises EvaluationError for values that are not finite."""
    parts = []
    shown = track(read, f"{name}: reading", len(passages.ids), console=Console(stderr=True))
    for number, (first, of_one) in enumerate(zip(passages.first, shown, strict=True)):
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


def read_vllm(passages: Passages, llm: "LLM", top: int, *, name: str = "model") -> Likelihoods:
    """Reads with a `vllm.LLM` whose `max_logprobs` allows `top`."""
    from vllm import SamplingParams

    vocabulary = llm.model_config.get_vocab_size()
    width = min(top, vocabulary)
    sampling = SamplingParams(
        temperature=0.0, max_tokens=1, prompt_logprobs=width, flat_logprobs=True, detokenize=False
    )
    step = max(1, AT_A_TIME // (passages.longest * (width + 1)))

    def read() -> Iterator[Read]:
        for start in range(0, len(passages.ids), step):
            prompts: list[Any] = [
                {"prompt_token_ids": ids.tolist()} for ids in passages.ids[start : start + step]
            ]
            for output in llm.generate(prompts, sampling, use_tqdm=False):
                flat: Any = output.prompt_logprobs
                # Each row begins with the passage's own token, wherever it ranks.
                ids = np.array(flat.token_ids, dtype=np.int32).reshape(-1, width + 1)
                values = np.array(flat.logprobs, dtype=np.float32).reshape(-1, width + 1)
                yield values[:, 0], ids[:, 1:], values[:, 1:]

    return _collect(passages, read(), vocabulary, name)


def read_server(
    passages: Passages,
    base_url: str,
    top: int,
    *,
    model: str,
    api_key: str = "EMPTY",
    concurrency: int = 8,
) -> Likelihoods:
    """Reads with a vLLM server, by the `prompt_logprobs` of its completions.

    The server's `--max-logprobs` (20 unless set) bounds `top`. Raises EvaluationError if the server
    cannot be reached, refuses, or is not vLLM.
    """
    import openai

    client = openai.OpenAI(base_url=base_url, api_key=api_key)

    def read(ids: NDArray[np.int32]) -> Read:
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
        # The passage's own token stands among the others, or beyond them by its rank.
        tops = [sorted(row.items(), key=lambda item: item[1]["rank"])[:top] for row in rows[1:]]
        return (
            np.array(own, dtype=np.float32),
            np.array([[int(token) for token, _ in row] for row in tops], dtype=np.int32),
            np.array([[value["logprob"] for _, value in row] for row in tops], dtype=np.float32),
        )

    try:
        with ThreadPoolExecutor(concurrency) as pool:
            return _collect(passages, pool.map(read, passages.ids), None, model)
    except openai.APIConnectionError:
        raise EvaluationError(f"no server answers at {base_url}") from None
    except openai.APIError as error:
        raise EvaluationError(f"{base_url} refused a passage: {error.message}") from None


def read_transformers(
    passages: Passages, model: Path | str, top: int, *, dtype: str = "bfloat16"
) -> Likelihoods:
    """Reads with Hugging Face transformers on the CPU: the reference for the other two."""
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)

    @torch.no_grad()
    def read(ids: NDArray[np.int32]) -> Read:
        tokens = torch.from_numpy(ids).long()
        logits = network(input_ids=tokens[None]).logits[0, :-1].float()
        logprobs = torch.log_softmax(logits, dim=-1)
        best = logprobs.topk(min(top, logprobs.shape[1]))
        own = logprobs.gather(1, tokens[1:, None]).squeeze(1)
        return own.numpy(), best.indices.int().numpy(), best.values.numpy()

    return _collect(passages, map(read, passages.ids), network.config.vocab_size, str(model))
