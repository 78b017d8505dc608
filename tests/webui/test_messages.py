"""What is sent for the history that the page shows."""

import base64
from pathlib import Path
from typing import Any

import pytest

from lvllm.chat.client import ChatError
from lvllm.webui.messages import conversation, part


def said(text: str, files: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A question as gradio keeps it."""
    pictures = [{"type": "file", "file": {"path": str(file)}} for file in files]
    return {"role": "user", "content": [*pictures, {"type": "text", "text": text}]}


def kept(message: dict[str, Any]) -> dict[str, Any]:
    """A part of an answer as gradio keeps it."""
    return message | {"content": [{"type": "text", "text": message["content"]}]}


def test_only_the_text_of_an_answer_is_sent_again() -> None:
    answer = [
        kept(part("hm", "thinking", title="Thinking", status="done")),
        kept(part("four")),
        kept(part("Calls `f`", "call")),
        kept(part("3 tokens", "numbers")),
    ]
    assert conversation([said("2 + 2?"), *answer], "and 3 + 3?", "Be brief.") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "four"},
        {"role": "user", "content": "and 3 + 3?"},
    ]


def test_questions_without_an_answer_are_left_out() -> None:
    broken = [kept(part("half")), kept(part("it broke off", "error"))]
    history = [said("first"), *broken, said("second"), said("third"), kept(part("yes"))]
    assert [one["content"] for one in conversation(history, "now", " ")] == ["third", "yes", "now"]


def test_pictures(tmp_path: Path) -> None:
    png, jpeg = tmp_path / "a.png", tmp_path / "b.jpg"
    png.write_bytes(b"one")
    jpeg.write_bytes(b"two")
    history = [said("what is it?", (png,)), kept(part("a cat"))]
    first, _, last = conversation(history, {"text": "", "files": [str(jpeg)]}, "")

    def picture(mime: str, content: bytes) -> dict[str, Any]:
        url = f"data:{mime};base64,{base64.b64encode(content).decode()}"
        return {"type": "image_url", "image_url": {"url": url}}

    text = {"type": "text", "text": "what is it?"}
    assert first["content"] == [picture("image/png", b"one"), text]
    assert last["content"] == [picture("image/jpeg", b"two")]


@pytest.mark.parametrize(
    ("name", "message"),
    [("notes.txt", "notes.txt is no picture"), ("missing.png", "missing.png cannot be read: No")],
)
def test_other_files_are_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ChatError, match=message):
        conversation([], {"text": "?", "files": [str(tmp_path / name)]}, "")
