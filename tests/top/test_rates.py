"""Rates between two scrapes."""

import dataclasses

import pytest

from lvllm.top.rates import between
from lvllm.top.scrape import Scrape, TopError, parse, scrape
from tests.top.fake_metrics import FakeMetrics, serving


@pytest.fixture
def two() -> tuple[Scrape, Scrape]:
    """Scrapes 4 seconds apart."""
    with FakeMetrics() as server:
        server.count(n0=100, n2=900)
        before = parse(server.text, 10.0)
        server.answers.labels("0").inc(80)
        server.prompts.labels("0").inc(400)
        server.count(n0=300, n1=800, n2=2900, n3=400, n4=1500, n5=200, n6=40_000, n7=20_000)
        server.count(n8=8, n9=4000, n10=1000, n11=500, n12=200, n13=10_000, n14=6, n15=2)
        server.count(n16=2, n17=1, n18=20, n19=3)
        return before, parse(server.text, 14.0)


def test_all_of_them(two: tuple[Scrape, Scrape]) -> None:
    rates = between(*two)
    assert (rates.seconds, rates.answer_tokens, rates.prompt_tokens) == (4, 20, 100)
    assert (rates.running, rates.waiting, rates.kv_cache) == (3, 1, 0.25)
    cpu, gpu = rates.paths
    assert (cpu.layers, cpu.path, cpu.calls, cpu.tokens) == ("offloaded", "cpu", 50, 200)
    assert cpu.experts == 7.5
    assert cpu.busy == pytest.approx(0.5)  # 2 of 4 s
    assert cpu.waiting == pytest.approx(0.1)
    assert cpu.gb_per_s == pytest.approx(30)  # 60 GB in 2 s of computing
    assert cpu.reasons == {"small": 50}
    assert (gpu.path, gpu.calls, gpu.tokens, gpu.experts) == ("streamed", 2, 1000, None)
    assert gpu.busy == pytest.approx(0.25)
    assert gpu.gb_per_s == pytest.approx(20)  # 10 GB in 0.5 s of copying
    assert rates.nodes == {"0": pytest.approx(10), "1": pytest.approx(5)}
    assert rates.groups == {"hit": 1.5, "stall": 0.5}
    assert rates.prefill_queue == {"queued": 2}
    assert (rates.nan_stops, rates.bank_bytes, rates.staging_bytes) == (1, 20e9, 3e9)


def test_ranks_read_side_by_side(two: tuple[Scrape, Scrape]) -> None:
    """With the same again from another rank, the bandwidth doubles, and the busy share does not."""

    def twice(one: Scrape) -> Scrape:
        samples = {
            name: [*values, *(({**own, "rank": "1"}, value) for own, value in values)]
            if name.startswith("lvllm")
            else values
            for name, values in one.samples.items()
        }
        return dataclasses.replace(one, samples=samples)

    one, both = between(*two), between(*map(twice, two))
    for alone, together in zip(one.paths, both.paths, strict=True):
        assert together.calls == 2 * alone.calls
        assert together.busy == alone.busy
        assert alone.gb_per_s is not None
        assert together.gb_per_s == pytest.approx(2 * alone.gb_per_s)


def test_a_server_that_began_anew(two: tuple[Scrape, Scrape]) -> None:
    before, after = two
    rates = between(after, dataclasses.replace(before, at=20.0))
    assert rates.answer_tokens == 0
    assert rates.paths[0].calls == 0
    assert rates.paths[0].gb_per_s is None


def test_the_environments_proxy_is_not_asked_for_this_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with serving() as server:
        assert scrape(server.url).sum("lvllm_bank_bytes") == 0


def test_other_servers_are_refused_in_one_line() -> None:
    with serving() as server:
        assert scrape(server.url + "/").sum("lvllm_bank_bytes") == 0
        with pytest.raises(TopError, match="the server answers 404"):
            scrape(server.url + "/v1")
        server.registry.unregister(server)  # type: ignore[arg-type]
        with pytest.raises(TopError, match=r"no metrics of LvLLM.*LVLLM_MOE_NUMA_ENABLED=1"):
            scrape(server.url)
    with pytest.raises(TopError, match=r"^http://127\.0\.0\.1:9/metrics: .*refused"):
        scrape("http://127.0.0.1:9")
