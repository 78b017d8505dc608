"""The picture of the routing."""

import random

import pytest

from lvllm.top.routing import Routing, routing
from lvllm.top.scrape import Scrape, TopError, parse
from tests.top.fake_metrics import FakeMetrics


def found(layers: int, experts: int) -> tuple[list[list[int]], Scrape]:
    """Random tokens [layer][expert], and a scrape of them."""
    tokens = [[random.randrange(1, 1000) for _ in range(experts)] for _ in range(layers)]
    with FakeMetrics(experts=experts, layers=layers) as server:
        server.numbers[40:] = [value for row in tokens for value in row]
        return tokens, parse(server.text, 0.0)


def test_layers_and_experts_are_in_the_order_of_their_numbers() -> None:
    tokens, scraped = found(11, 13)
    layers = routing(scraped).layers
    assert list(layers) == [str(layer) for layer in range(11)]
    assert [list(experts.values()) for experts in layers.values()] == tokens
    assert list(layers["10"]) == [str(expert) for expert in range(13)]


def test_a_shade_for_each_expert() -> None:
    one = Routing({"3": {"0": 0.0, "1": 1.0, "2": 9.0, "3": 20.0, "4": 50.0}})  # 16 on average
    assert one.picture(80) == [("3", " ░▒▒▓")]
    assert Routing({"0": {str(e): float(e == 7) for e in range(8)}}).picture(80) == [
        ("0", "       █")
    ]
    assert Routing({"0": {"0": 0.0, "1": 0.0}}).picture(80) == [("0", "  ")]


def test_neighbours_share_shades_where_there_is_no_room() -> None:
    _, scraped = found(9, 100)
    rows = routing(scraped).picture(30, 4)
    assert [name for name, _ in rows] == ["0-1", "2-3", "4-5", "6-8"]
    assert {len(shades) for _, shades in rows} == {30}
    split = Routing({"0": {"0": 8.0, "1": 8.0, "2": 0.0, "3": 0.0}})
    assert split.picture(2) == [("0", "▒ ")]


def test_the_hottest() -> None:
    tokens, scraped = found(4, 10)
    hottest = routing(scraped).hottest(5)
    times = [
        (10 * value / sum(row), str(layer), str(expert))
        for layer, row in enumerate(tokens)
        for expert, value in enumerate(row)
    ]
    wanted = sorted(times, key=lambda one: -one[0])[:5]
    assert [hot.times for hot in hottest] == pytest.approx([one[0] for one in wanted])
    for hot in hottest:
        row = tokens[int(hot.layer)]
        assert hot.share == pytest.approx(row[int(hot.expert)] / sum(row))


def test_a_server_that_does_not_tell() -> None:
    with FakeMetrics() as server, pytest.raises(TopError, match="LVLLM_METRICS_EXPERTS=1"):
        routing(parse(server.text, 0.0))
