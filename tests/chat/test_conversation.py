"""What is sent of a conversation, and what is saved."""

import json
from pathlib import Path

import pytest

from lvllm.chat.conversation import Conversation


def test_messages_and_retry() -> None:
    chat = Conversation("Be brief.")
    assert not chat.retry()
    chat.ask("one")
    chat.answer("1")
    chat.ask("two")
    system, one = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "one"}
    two = {"role": "user", "content": "two"}
    assert chat.messages() == [system, one, {"role": "assistant", "content": "1"}, two]
    chat.ask("three")  # in the place of "two", which was not answered
    assert chat.messages()[-1] == {"role": "user", "content": "three"}
    assert len(chat.messages()) == 4
    chat.answer("3")
    assert chat.retry()
    assert chat.messages()[-1] == {"role": "user", "content": "three"}
    chat.clear()
    assert chat.messages() == [system]
    assert not chat.retry()
    with pytest.raises(ValueError):
        chat.answer("to nothing")


def test_save_writes_answered_messages_and_overwrites_nothing(tmp_path: Path) -> None:
    chat = Conversation()
    chat.ask("hé")
    chat.answer("ho")
    chat.ask("unanswered")
    file = tmp_path / "chat.json"
    chat.save(file)
    assert json.loads(file.read_text("utf-8")) == [
        {"role": "user", "content": "hé"},
        {"role": "assistant", "content": "ho"},
    ]
    with pytest.raises(FileExistsError):
        chat.save(file)
