"""How texts and chats are cut into passages, and what a saved reference run keeps of that."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvllm.evaluation import Question, passages, reference
from lvllm.evaluation.likelihood import Likelihoods

BOS = 256


class Letters:
    """Each byte is a token. With `bos` each text begins with one. Chats are `Q`, `A` and texts."""

    def __init__(self, bos: bool = False) -> None:
        self.bos = bos

    def encode(self, text: str, *, special: bool) -> list[int]:
        return [BOS] * (special and self.bos) + list(text.encode())

    def chat(self, messages: list[dict[str, str]], *, generation_prompt: bool) -> list[int]:
        turns = [m["role"][0] + m["content"] for m in messages]
        return list(("".join(turns) + "a" * generation_prompt).encode())


def text_file(folder: Path, text: str | bytes) -> Path:
    path = folder / "text.txt"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@given(st.data())
def test_each_token_is_scored_once_after_enough_others(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    bos = data.draw(st.booleans())
    context = data.draw(st.integers(2 + bos, 20))
    stride = data.draw(st.integers(1, context - bos))
    length = data.draw(st.integers(context - bos, 90))
    text = "".join(chr(33 + i) for i in range(length))
    path = text_file(tmp_path_factory.mktemp("text"), text)
    found = passages.of_text(path, Letters(bos), context, stride)
    scored: list[int] = []
    for ids, first in zip(found.ids, found.first, strict=True):
        assert len(ids) <= context
        assert first >= 1
        assert (ids[0] == BOS) == bos
        scored += ids[first:].tolist()
        start = text.encode().index(int(ids[int(bos)]))
        before = first - bos  # Tokens of the text before the first scored one.
        assert start == 0 or before >= min(context - bos - stride, 1)
        assert start == 0 or before >= context - bos - stride
    everything = list(text.encode())
    if stride < context - bos or bos:
        assert scored == everything[not bos :]
    else:  # Windows side by side: the first token of each has nothing before it.
        assert scored == [token for i, token in enumerate(everything) if i % stride]
    assert found.scored == len(scored)
    assert found.longest == context


@pytest.mark.parametrize(
    ("text", "context", "stride", "message"),
    [
        ("", 8, 4, "text.txt holds no text"),
        (" \n", 8, 4, "text.txt holds no text"),
        (b"abc\xff", 8, 4, "text.txt is not UTF-8: invalid start byte at byte 3"),
        ("1234567", 8, 4, "text.txt has 7 tokens, fewer than one window of 8"),
        ("1234567890", 8, 9, "--stride 9 with --context 8: allowed is 1 to 8"),
        ("1234567890", 8, 0, "--stride 0 with --context 8: allowed is 1 to 8"),
        ("1234567890", 1, 1, "--stride 1 with --context 1"),
    ],
)
def test_a_text_that_cannot_be_cut_is_refused(
    tmp_path: Path, text: str | bytes, context: int, stride: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        passages.of_text(text_file(tmp_path, text), Letters(), context, stride)


def question(text: str, answer: str) -> Question:
    return Question(task="add", operands=(), question=text, answer=answer)


def test_of_a_chat_the_answer_is_scored() -> None:
    found = passages.of_chats([question("1+1", "2"), question("say", "hello")], Letters())
    assert [bytes(ids.astype(np.uint8)) for ids in found.ids] == [b"u1+1a2", b"usayahello"]
    assert found.first == (5, 5)
    assert found.scored == 1 + 5


def likelihoods(count: int) -> Likelihoods:
    draw = np.random.default_rng(random.getrandbits(32))
    ids = draw.integers(0, 99, (count, 4), dtype=np.int32)
    return Likelihoods(draw.random(count, np.float32), ids, draw.random((count, 4), np.float32), 99)


def test_a_reference_is_kept_whole(tmp_path: Path) -> None:
    read = passages.of_text(text_file(tmp_path, "some longer text"), Letters(), 6, 3)
    kept = reference.ReferenceRun("model", read, likelihoods(read.scored))
    path = tmp_path / "kept"
    reference.save(path, kept)
    loaded = reference.load(path)
    assert loaded.name == "model"
    assert loaded.passages.same_ids(read)
    assert replace(loaded.passages, ids=read.ids) == read
    assert loaded.likelihoods.vocabulary == 99
    for name in ("logprobs", "top_ids", "top_logprobs"):
        assert np.array_equal(getattr(loaded.likelihoods, name), getattr(kept.likelihoods, name))
    reference.check(loaded, read, path)


class Shifted(Letters):
    def encode(self, text: str, *, special: bool) -> list[int]:
        return [token + 1 for token in super().encode(text, special=special)]


@pytest.mark.parametrize(
    ("text", "tokenizer", "stride", "message"),
    [
        ("some longer text", Letters(), 2, "windows of 6 tokens, every 3; this run has"),
        ("some other text.", Letters(), 3, "was made of another text: text.txt in windows"),
        ("some longer text", Shifted(), 3, "was made with another tokenizer"),
    ],
)
def test_a_reference_of_something_else_is_refused(
    tmp_path: Path, text: str, tokenizer: Letters, stride: int, message: str
) -> None:
    read = passages.of_text(text_file(tmp_path, "some longer text"), Letters(), 6, 3)
    path = tmp_path / "kept"
    reference.save(path, reference.ReferenceRun("model", read, likelihoods(read.scored)))
    other = passages.of_text(text_file(tmp_path, text), tokenizer, 6, stride)
    with pytest.raises(ValueError, match=message):
        reference.check(reference.load(path), other, path)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut"])
def test_a_file_that_is_no_reference_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "kept.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"kept\.npz is no reference saved by --save"):
        reference.load(path)
    with path.open("wb") as file:
        np.savez(file, logprobs=np.zeros(3))
    with pytest.raises(ValueError, match=r"kept\.npz is no reference saved by --save"):
        reference.load(path)
