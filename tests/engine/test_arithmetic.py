"""How each format is multiplied, and what is said of it."""

from dataclasses import astuple

import pytest

from lvllm import engine
from lvllm.engine import FORMATS, Arithmetic, arithmetic_of, explain
from tests.engine.random_case import ISAS

pytestmark = pytest.mark.usefixtures("default_settings")


@pytest.mark.parametrize("isa", ISAS)
def test_a_given_instruction_set_multiplies_every_format(isa: str) -> None:
    engine.configure(isa=isa)
    assert not engine.info().rates
    for name, stored in FORMATS.items():
        assert {arithmetic_of(name, bits).isa for bits in stored.activation_bits} == {isa}


def test_without_one_the_rates_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LK_ISA", raising=False)
    engine.configure()
    rates = engine.info().rates
    for name, stored in FORMATS.items():
        for bits in stored.activation_bits:
            chosen = arithmetic_of(name, bits)
            assert rates[chosen] > 1e8, "not even a tenth of one product a cycle"


def test_unknown_formats_are_refused() -> None:
    with pytest.raises(ValueError, match='format is "int3"'):
        arithmetic_of("int3", 16)


def test_the_explanation_names_what_was_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    floats, pairs = Arithmetic("avx512_vbmi", "float"), Arithmetic("avx512_bf16", "bf16")
    older, bytes_ = Arithmetic("avx512", "float"), Arithmetic("avx512_bf16", "int8")
    of_bf16 = {"arithmetic": list(astuple(floats)), "arithmetics": []}
    for other in (older, floats, pairs):
        of_bf16["arithmetics"] += astuple(other)
    for name, value in of_bf16.items():
        monkeypatch.setattr(f"lvllm.engine.arithmetic.raw_ops.{name}", lambda *_, v=value: v)
    rates = {floats: 88e9, pairs: 43e9, older: 87e9, bytes_: 368e9}
    assert explain("bf16", 16, rates) == (
        "floats (avx512_vbmi), 88 billion weights a second and core"
        " (43 as pairs of bf16 (avx512_bf16))"
    )
    assert explain("bf16", 16, {}) == "floats (avx512_vbmi)"


def test_other_arithmetics_of_a_format_alone_are_compared() -> None:
    rates = dict.fromkeys(engine.info().rates, 1e9)
    assert "integers" not in explain("bf16", 16, rates)
