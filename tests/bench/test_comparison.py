"""Results beside plans and beside stock vLLM: judged, written and drawn."""

import io
import random
from pathlib import Path

import pytest
from rich.console import Console

from lvllm.bench.comparison import RIGHT, Report, Row, misses, planned
from lvllm.bench.plot import plot
from lvllm.bench.speed import Percentiles, Result
from lvllm.bench.text import latency_table, prefill_table, rates_table
from lvllm.planning.choice import choose
from lvllm.planning.placement import Load
from lvllm.planning.speed import predict
from lvllm.serving.defaults import Defaults
from tests.planning.made_up import machine, model


def result(prompt: int, users: int, decode: float | None, prefill: float = 1000) -> Result:
    some = Percentiles(p50=0.5, p90=0.75, p99=1.25)
    return Result(
        prompt=prompt,
        answer=64,
        users=users,
        requests=2 * users,
        first_token=some,
        between_tokens=some,
        whole=some,
        output_rate=12.5,
        prefill_rate=prefill if users == 1 else None,
        decode_rate=decode,
    )


def row(one: Result, prefill_off: float, decode_off: float) -> Row:
    """With a plan of which the result is so many times."""
    best = choose(model(), machine(), Load()).best
    assert best is not None
    said = planned(Defaults(model(), machine(), best, None, ()), one)
    assert said is not None
    measured = one.model_copy(
        update={
            "prefill_rate": None if one.prefill_rate is None else said.prefill_rate * prefill_off,
            "decode_rate": said.decode_rate * decode_off,
        }
    )
    return Row(measured=measured, planned=said)


def test_a_plan_is_asked_for_the_same_load() -> None:
    best = choose(model(), machine(), Load(batch=512)).best
    assert best is not None
    found = planned(Defaults(model(), machine(), best, None, ()), result(700, 5, 1))
    assert found is not None
    speed = predict(model(), machine(), best.how, Load(700, 64, 5, best.load.context, 512))
    assert (found.prefill_rate, found.decode_rate) == (speed.prefill_rate, speed.decode_rate)
    assert planned(Defaults(model(), machine(), None, "too large", ()), result(1, 1, 1)) is None
    assert planned(None, result(1, 1, 1)) is None


def test_a_wrong_prediction_is_named() -> None:
    inside, slow, fast = 1 - 0.9 * RIGHT, 1 - 1.1 * RIGHT, 1 + 1.1 * RIGHT
    assert misses([row(result(512, 1, 1), inside, 1 + 0.9 * RIGHT)]) == []
    found = misses([row(result(512, 1, 1), slow, inside), row(result(512, 4, 1), 1, fast)])
    assert len(found) == 2
    assert found[0].startswith("prefill of 512: ")
    assert found[1].startswith("decode with 4 users behind 512 tokens: ")
    assert misses([Row(measured=result(512, 1, 1))]) == []


def printed(rows: list[Row]) -> str:
    console = Console(width=80, record=True, file=io.StringIO())
    for table in (prefill_table(rows), rates_table(rows), latency_table(rows)):
        console.print(table)
    return console.export_text()


def test_tables_fit_a_terminal() -> None:
    stock = result(16384, 16, 1234.5)
    rows = [
        row(result(16384, 1, 2345.6, 123456.7), 1, 1).model_copy(update={"stock": stock}),
        row(result(16384, 1024, 2345.6), 1, 1).model_copy(update={"stock": stock}),
    ]
    text = printed(rows)
    assert "…" not in text
    assert "1.00" in text
    assert "0.500 / 1.250" in text
    alone = printed([Row(measured=result(512, 1, None))])
    assert "planned" not in alone
    assert "stock" not in alone
    assert " - " in alone


@pytest.mark.parametrize("compared", [True, False])
def test_drawn(compared: bool, tmp_path: Path) -> None:
    draw = random.Random(random.getrandbits(32))
    rows = [
        row(result(prompt, users, 1), draw.uniform(0.5, 2), draw.uniform(0.5, 2))
        for prompt in (128, 1024)
        for users in (1, 4, 16)
    ]
    if not compared:
        rows = [Row(measured=one.measured) for one in rows]
    file = tmp_path / "a.png"
    plot(file, Report(model="m", server="s", way=None, machine=None, rows=rows))
    assert file.read_bytes().startswith(b"\x89PNG")
