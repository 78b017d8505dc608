"""Sends requests to a server by the load generator of `vllm bench serve`."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

from lvllm.checkpoint.gguf.folder import folder_of
from lvllm.errors import LvllmError
from lvllm.loopback import around_proxies

__all__ = ["BenchError", "Endpoint", "LoadGenerator", "Request", "requests_of"]


class BenchError(LvllmError):
    """The server did not answer, or the model's tokenizer is missing."""


@dataclass(frozen=True)
class Endpoint:
    """Where the server is, and the model that it is asked for."""

    url: str
    """Without a path."""
    model: str | None
    """A folder or an id on the hub, whose tokenizer makes prompts; None: as the server says."""
    served: str | None = None
    """The name that the server knows the model by, where it is another one."""
    tokenizer: str | None = None
    """A folder or an id whose tokenizer makes prompts in the place of the model's."""
    trust: bool = False
    """Whether code beside the model's tokenizer may run (--trust-remote-code)."""


@dataclass(frozen=True)
class Request:
    """The times of one request, in seconds of one clock."""

    prompt: int
    """Tokens of the prompt."""
    answer: int
    """Tokens of the answer."""
    start: float
    pieces: tuple[float, ...] = field(repr=False)
    """When each piece of the answer came. With a draft model, a piece may have several tokens."""

    @property
    def first(self) -> float:
        return self.pieces[0]

    @property
    def end(self) -> float:
        return self.pieces[-1]


class LoadGenerator:
    """Another process, which sends requests. Used in a `with` block."""

    def __init__(self, log: Path, key: str = "") -> None:
        """Start the process. Its output goes to `log`; `key` is the server's API key, if any."""
        self._log = log
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "lvllm.bench.generator"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env=around_proxies(os.environ) | ({"OPENAI_API_KEY": key} if key else {}),
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()  # It may still wait for a server.
        self._process.communicate()

    def send(
        self, to: Endpoint, prompt: int, answer: int, users: int, requests: int, seed: int
    ) -> list[Request]:
        """Send `requests` prompts, so that `users` of them are always under way.

        Prompts are random, and other ones for each seed. Answers are greedy and do not end early.

        Raises BenchError if a request fails.
        """
        words = ["--base-url", to.url, "--dataset-name", "random", "--disable-tqdm"]
        words += ["--random-input-len", str(prompt), "--random-output-len", str(answer)]
        words += ["--num-prompts", str(requests), "--max-concurrency", str(users)]
        words += ["--seed", str(seed), "--temperature", "0", "--ignore-eos", "--save-detailed"]
        if to.model is not None:
            words += ["--model", to.model]
            words += ["--served-model-name", to.served or to.model]
            if tokenizer := to.tokenizer or folder_of(to.model):
                words += ["--tokenizer", str(tokenizer)]
        if to.trust:
            words.append("--trust-remote-code")
        return requests_of(self._ask(words))

    def _ask(self, words: Sequence[str]) -> dict[str, Any]:
        asked, answers = self._process.stdin, self._process.stdout
        assert asked is not None
        assert answers is not None
        try:
            print(json.dumps(words), file=asked, flush=True)
            line = answers.readline()
        except BrokenPipeError:
            line = ""
        answer: dict[str, Any] = json.loads(line) if line else {"error": "it ended"}
        if "error" in answer:
            said = f"{answer['error'][:500]}; its output is in {self._log}"
            raise BenchError(f"vllm bench serve: {said}")
        result: dict[str, Any] = answer["result"]
        return result


def requests_of(result: dict[str, Any]) -> list[Request]:
    """The requests in a detailed result of `vllm bench serve`. Raises BenchError for a failed one.

    vLLM has the time to the first token and then those from one token to the next.
    """
    if wrong := [text for text in result["errors"] if text]:
        raise BenchError(
            f"{len(wrong)} of {len(result['errors'])} requests failed: {_short(wrong)}"
        )
    names = ("input_lens", "output_lens", "start_times", "ttfts", "itls")
    return [
        Request(prompt, answer, start, tuple(accumulate(between, initial=start + first)))
        for prompt, answer, start, first, between in zip(*(result[n] for n in names), strict=True)
    ]


def _short(errors: Sequence[str]) -> str:
    """The first error in one line: a server's message, or the last line of a traceback."""
    text = errors[0]
    try:
        return str(json.loads(text)["error"]["message"])[:500]
    except (ValueError, KeyError, TypeError):
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return lines[-1][:500] if lines else "without a message"
