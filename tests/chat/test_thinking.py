"""Thinking and answer are told apart wherever a text is cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvllm.chat.thinking import ThinkingSplitter


def split(*parts: str) -> tuple[str, str]:
    """The thinking and the answer of a text that comes in `parts`."""
    splitter = ThinkingSplitter()
    pieces = [piece for part in parts for piece in splitter.feed(part)]
    pieces += splitter.finish()
    assert all(piece.text for piece in pieces)
    return tuple(
        "".join(piece.text for piece in pieces if piece.thinking is thinking)
        for thinking in (True, False)
    )  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("text", "thinking", "answer"),
    [
        ("", "", ""),
        ("yes", "", "yes"),
        ("  yes", "", "  yes"),
        ("<think>hm</think>yes", "hm", "yes"),
        ("\n<think>\nhm\n</think>\n\nyes\n", "\nhm\n", "yes\n"),
        ("<think></think>yes", "", "yes"),
        ("<think>one</think> <think>two</think>yes", "onetwo", "yes"),
        ("<think>without an end", "without an end", ""),
        ("<think>half </thin", "half </thin", ""),
        ("<think>hm</think>\n", "hm", ""),
        ("<think>a < b</think>a <= b", "a < b", "a <= b"),
        ("<thin air>", "", "<thin air>"),
        ("  <thi", "", "  <thi"),
        ("The tag <think> begins it.", "", "The tag <think> begins it."),
        ("</think>yes", "", "</think>yes"),
    ],
)
def test_split(text: str, thinking: str, answer: str) -> None:
    assert split(text) == (thinking, answer)
    assert split(*text) == (thinking, answer)  # character by character


WORDS = st.sampled_from(["<think>", "</think>", "<", "</", "think", ">", " ", "\n", "a", "é"])


@given(words=st.lists(WORDS, max_size=20), data=st.data())
def test_any_chunks_give_the_same_split(words: list[str], data: st.DataObject) -> None:
    text = "".join(words)
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8).map(sorted))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert split(*parts) == split(text)


@given(st.text().filter(lambda text: "<" not in text))
def test_a_text_without_tags_is_all_answer(text: str) -> None:
    assert split(*text) == ("", text)


def test_nothing_certain_is_held_back() -> None:
    splitter = ThinkingSplitter()
    assert [piece.text for piece in splitter.feed("<think>ab</")] == ["ab"]
    assert [piece.text for piece in splitter.feed("c</think>d")] == ["</c", "d"]
    assert [piece.text for piece in splitter.feed("e<think>")] == ["e<think>"]
