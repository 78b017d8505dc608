"""Messages of several lines, and what is printed of an answer."""

from collections.abc import Iterator

import pytest

from lvllm.chat.printing import print_pieces
from lvllm.chat.terminal import read_message
from lvllm.chat.thinking import Piece


@pytest.mark.parametrize(
    ("lines", "message", "quoted"),
    [
        (["hello"], "hello", False),
        (["one\\", "two\\", "three"], "one\ntwo\nthree", False),
        (['"""', "/one", "", "two\\", '"""'], "/one\n\ntwo\\", True),
        (['"""', '"""'], "", True),
        (["pasted\nat once"], "pasted\nat once", False),
        (
            ['"""\nbegun\nby pasting', "ended by hand", ' """ '],
            "begun\nby pasting\nended by hand",
            True,
        ),
        (['"""\nall pasted\n"""'], "all pasted", True),
        (['"""quoted""" words'], '"""quoted""" words', False),
    ],
)
def test_read_message(lines: list[str], message: str, quoted: bool) -> None:
    prompts: list[str] = []

    def read_line(prompt: str) -> str:
        prompts.append(prompt)
        return lines[len(prompts) - 1]

    assert read_message(read_line) == (message, quoted)
    assert prompts == [">>> "] + ["... "] * (len(lines) - 1)


def test_thinking_and_answer_are_on_lines_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    print_pieces([Piece("\nhm", True), Piece("\n"), Piece("\nyes\t"), Piece("1\n\n2")])
    assert capsys.readouterr().out == "hm\nyes\t1\n\n2\n"
    print_pieces([Piece("hm\n", True), Piece("yes\n")])
    assert capsys.readouterr().out == "hm\nyes\n"
    print_pieces([])
    assert capsys.readouterr().out == ""


def test_a_model_cannot_control_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    print_pieces([Piece("a\x1b[2Jb\r\x07\x9bc")])
    assert capsys.readouterr().out == "a[2Jbc\n"


def test_the_line_ends_after_an_exception(capsys: pytest.CaptureFixture[str]) -> None:
    def pieces() -> Iterator[Piece]:
        yield Piece("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        print_pieces(pieces())
    assert capsys.readouterr().out == "half\n"
