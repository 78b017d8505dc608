"""lvllm.errors: how an error about a layer gets the layer's name."""

from types import SimpleNamespace
from typing import Any

import pytest

from lvllm.errors import LayerError, LvllmError, layer_errors, naming_layer, quoted, readable


@pytest.mark.parametrize("kind", [ValueError, MemoryError])
def test_an_error_about_a_layer_names_it(kind: type[Exception]) -> None:
    with pytest.raises(LayerError, match=r"^layers\.3: too little$"), naming_layer("layers.3"):
        raise kind("too little")
    with pytest.raises(LayerError, match=r"^layers\.3\.w2: no$"), naming_layer("layers.3"):
        raise kind("layers.3.w2: no")


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(LvllmError, match=r"^LVLLM_X=1$"), naming_layer("layers.3"):
        raise LvllmError("LVLLM_X=1")
    with pytest.raises(RuntimeError, match=r"^of something else$"), naming_layer("layers.3"):
        raise RuntimeError("of something else")


def test_a_method_runs_under_the_name_of_its_layer() -> None:
    class Method:
        @layer_errors
        def double(self, layer: Any, number: int) -> int:
            if number < 0:
                raise ValueError(f"number is {number}")
            return 2 * number

    layer = SimpleNamespace(layer_name="layers.3")
    assert Method().double(layer, number=4) == 8
    with pytest.raises(LayerError, match=r"^layers\.3: number is -1$"):
        Method().double(layer=layer, number=-1)


@pytest.mark.parametrize(
    ("written", "line"),
    [
        ("a b", "'a b'"),
        ("a\n\u2028\ud800", r"'a\n\u2028\ud800'"),
        (True, "true"),
        ([1, "x"], '[1, "x"]'),
        (float("inf"), "Infinity"),
        ("x" * 200, f"'{'x' * 200}'"),
        ("x" * 201, f"'{'x' * 199}..."),
        ([1] * 100_000, f"[{'1, ' * 66}1..."),
    ],
)
def test_what_a_user_wrote_stays_on_the_line(written: object, line: str) -> None:
    assert quoted(written) == line


@pytest.mark.parametrize(
    ("name", "line"),
    [("/a b/内", "/a b/内"), ("A\nB", r"'A\nB'"), ("A ", "'A '"), ("x" * 201, f"'{'x' * 199}...")],
)
def test_names_are_readable(name: str, line: str) -> None:
    assert readable(name) == line
