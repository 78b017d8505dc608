"""The passages of token ids that a model reads to be measured, and which of their tokens count."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lvllm.evaluation.questions import Question


class Tokenizer(Protocol):
    """Turns text into token ids, as the measured model does."""

    def encode(self, text: str, *, special: bool) -> list[int]:
        """The ids of `text`. With `special`, the tokens that belong around a text are added."""

    def chat(self, messages: list[dict[str, str]], *, generation_prompt: bool) -> list[int]:
        """The ids of a chat in the model's chat template."""


class LocalTokenizer:
    """The tokenizer of a checkpoint folder, which errors call `model` if that is given.

    Raises ValueError if there is none that loads.
    """

    def __init__(self, folder: str, model: str = "") -> None:
        from transformers import AutoTokenizer

        self.model = model = model or folder
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        except Exception as error:  # transformers raises all kinds of errors for a broken file.
            reason = " ".join(str(error).split())
            raise ValueError(f"{model}: its tokenizer does not load: {reason}") from None

    def encode(self, text: str, *, special: bool) -> list[int]:
        # With `verbose` there would be a warning about a text longer than the model's context, but
        # the text is cut into windows.
        return list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def chat(self, messages: list[dict[str, str]], *, generation_prompt: bool) -> list[int]:
        if self.tokenizer.chat_template is None:
            raise ValueError(f"{self.model} has no chat template to ask questions with")
        ids = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=generation_prompt, return_dict=True
        )
        return list(ids["input_ids"])


@dataclass(frozen=True)
class Passages:
    """Token ids, one array for each passage, and how the passages were cut.

    In passage i the tokens from number `first[i]` on are scored, each by its probability after all
    earlier tokens of the passage. `first[i]` is at least 1.
    """

    ids: tuple[NDArray[np.int32], ...]
    first: tuple[int, ...]
    source: str
    """A description for people: `wiki.txt in windows of 512 tokens, every 256`."""
    digest: str
    """sha256 of the text, or of the chats' questions and answers."""
    cut: str
    """How the text was cut: equal texts and tokenizers with equal cuts give equal passages."""

    @property
    def scored(self) -> int:
        """How many tokens are scored."""
        return sum(len(ids) - first for ids, first in zip(self.ids, self.first, strict=True))

    @property
    def longest(self) -> int:
        """Tokens of the longest passage."""
        return max(len(ids) for ids in self.ids)

    def same_ids(self, other: "Passages") -> bool:
        """Whether the same tokens are read and scored."""
        return len(self.ids) == len(other.ids) and all(
            a == b and np.array_equal(c, d)
            for a, b, c, d in zip(self.first, other.first, self.ids, other.ids, strict=True)
        )


def of_text(path: Path, tokenizer: Tokenizer, context: int, stride: int) -> Passages:
    """Cut a text into windows of `context` tokens, one every `stride` tokens.

    A window scores the tokens that the window before it did not reach. So each token of the text is
    scored once, after at least `context - stride` others, except that the first tokens of the text
    have fewer before them. Without a BOS token, the very first token is not scored. A BOS token
    that the tokenizer puts before a text is put before each window and is not scored: models that
    were trained with it give useless probabilities without it.

    Raises ValueError for a file that is not UTF-8 or shorter than a window, and for a stride that
    leaves tokens out; OSError for a file that cannot be read.
    """
    data = path.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None
    if not text.strip():
        raise ValueError(f"{path} holds no text")
    prefix = _before_a_text(tokenizer)
    body = context - len(prefix)
    if not 1 <= stride <= body or context < 2:
        raise ValueError(f"--stride {stride} with --context {context}: allowed is 1 to {body}")
    tokens = np.array(tokenizer.encode(text, special=False), dtype=np.int32)
    if len(tokens) < body:
        raise ValueError(
            f"{path} has {len(tokens)} tokens, fewer than one window of {context}; give a longer"
            " text or a smaller --context"
        )
    ids, first = [], []
    before = np.array(prefix, dtype=np.int32)
    start = reached = 0
    while reached < len(tokens):
        window = tokens[start : start + body]
        ids.append(np.concatenate((before, window)))
        first.append(max(1, len(prefix) + reached - start))
        reached = start + len(window)
        start += stride
    cut = f"windows of {context} tokens, every {stride}"
    return Passages(
        tuple(ids), tuple(first), f"{path.name} in {cut}", hashlib.sha256(data).hexdigest(), cut
    )


def _before_a_text(tokenizer: Tokenizer) -> list[int]:
    plain = tokenizer.encode("a", special=False)
    whole = tokenizer.encode("a", special=True)
    for length in range(len(whole) - len(plain) + 1):
        if whole[length : length + len(plain)] == plain:
            return whole[:length]
    return []


def of_chats(questions: Sequence[Question], tokenizer: Tokenizer) -> Passages:
    """Make a chat of each question and its right answer. The answer's tokens are scored."""
    digest = hashlib.sha256()
    ids, first = [], []
    for question in questions:
        digest.update(f"{question.question}\0{question.answer}\0".encode())
        answer = {"role": "assistant", "content": question.answer}
        asked = tokenizer.chat(question.messages, generation_prompt=True)
        whole = tokenizer.chat([*question.messages, answer], generation_prompt=False)
        # The prompt for an answer need not be how a finished chat begins: some templates write more
        # before an answer. Scoring begins where the two differ.
        common = next(
            (i for i, (a, b) in enumerate(zip(asked, whole, strict=False)) if a != b), len(asked)
        )
        ids.append(np.array(whole, dtype=np.int32))
        first.append(min(max(1, common), len(whole) - 1))
    cut = "chats, the answers scored"
    return Passages(tuple(ids), tuple(first), f"{len(ids)} {cut}", digest.hexdigest(), cut)
