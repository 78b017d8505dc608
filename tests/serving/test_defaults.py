"""What a plan chooses around what the user gave, and what it refuses."""

from random import randint, randrange

import pytest

from lvllm.planning.choice import THRESHOLDS
from lvllm.planning.machine import Machine
from lvllm.serving.defaults import Defaults, choose
from lvllm.serving.given import read
from lvllm.settings.variables import SettingError
from lvllm.units import GIB
from tests.planning.made_up import machine, model

BIG = model(layers=24, experts=128, chosen=8)
"""The experts take 55 GiB, and one of them 19 MiB."""
CARD = machine(gib=128, gpus=1)
OWN = "additional_config.lvllm."


def chosen(on: Machine, *words: str, **environ: str) -> Defaults:
    named = {f"LVLLM_{name.upper()}": value for name, value in environ.items()}
    return choose(BIG, on, read(["m", *words], named))


def settings(of: Defaults) -> dict[str, object]:
    assert of.best is not None
    assert of.best.memory.lacks is None
    return {one.key.removeprefix(OWN): one.value for one in of.settings}


def test_a_cache_leaves_the_kv_cache_its_contexts() -> None:
    found = chosen(CARD)
    told = settings(found)
    assert found.best is not None
    assert "gpu_resident_moe_layers" not in told
    assert found.best.how.cache == pytest.approx(float(str(told["gpu_expert_cache"])) * GIB)
    card = found.best.memory.card
    assert card["KV cache"] == BIG.cache_bytes(int(str(told["max-model-len"])))
    assert sum(card.values()) + card["KV cache"] / 8 <= 0.9 * 24 * GIB


def test_a_cache_that_was_given_is_not_planned_over() -> None:
    """Resident layers get what it leaves of the card."""
    size = randint(2, 10)
    found = chosen(CARD, gpu_expert_cache=str(size))
    told = settings(found)
    assert found.best is not None
    assert "gpu_expert_cache" not in told
    assert found.best.how.cache == size * GIB
    assert size * GIB <= found.best.memory.card["cached experts"] + 20 * (1 << 20)
    off = chosen(CARD, gpu_expert_cache="0")
    assert off.best is not None
    assert off.best.how.cache == 0
    assert "gpu_resident_moe_layers" in settings(off)


def test_a_cache_has_what_given_layers_leave() -> None:
    count = randrange(1, 5)
    found = chosen(CARD, gpu_resident_moe_layers=f"1-{count}")
    told = settings(found)
    assert found.best is not None
    assert found.best.how.resident == count
    assert "gpu_resident_moe_layers" not in told
    assert float(str(told["gpu_expert_cache"])) > 0
    alone = chosen(CARD).best
    assert alone is not None
    assert found.best.how.cache < alone.how.cache


def test_sizes_of_several_cards() -> None:
    found = chosen(machine(gib=128, gpus=2), gpu_expert_cache="1,2.5")
    assert found.best is not None
    assert found.best.how.cache == 2.5 * GIB


@pytest.mark.parametrize("threshold", ["0", "300", "5000", "auto"])
def test_a_threshold_that_was_given_is_planned_with(threshold: str) -> None:
    found = chosen(CARD, gpu_prefill_min_batch_size=threshold)
    told = settings(found)
    assert found.best is not None
    assert not {"gpu_prefill_min_batch_size", "gpu_prefetch_window"} & set(told)
    assert float(str(told["gpu_expert_cache"])) > 0
    if threshold == "auto":
        assert found.best.how.streamed_from in THRESHOLDS
    else:
        assert found.best.how.streamed_from == (int(threshold) or None)
    # vLLM refuses a threshold above the largest batch.
    assert int(str(told["max-num-batched-tokens"])) >= (found.best.how.streamed_from or 0)


def test_less_of_the_card_is_less_cache() -> None:
    whole = chosen(CARD).best
    assert whole is not None
    for words, environ in (
        (["--gpu-memory-utilization", "0.6"], {}),
        (["--kv-cache-memory-bytes", str(12 * GIB)], {}),
        ([], {"prefill_engine": "auto"}),
    ):
        found = chosen(CARD, *words, **environ)
        assert found.best is not None
        assert 0 < found.best.how.cache < whole.how.cache
        assert found.best.memory.lacks is None
    own = chosen(CARD, prefill_engine="auto", prefill_engine_gpu="1").best
    assert own is not None
    assert own.how.cache == whole.how.cache


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("24.5", "LVLLM_GPU_EXPERT_CACHE='24.5': a GPU has 24.00 GiB; allowed is less"),
        ("0.018", "LVLLM_GPU_EXPERT_CACHE='0.018': an expert takes 0.018626 GiB of a GPU; allowed"),
    ],
)
def test_a_cache_that_cannot_be_is_refused(value: str, said: str) -> None:
    with pytest.raises(SettingError) as error:
        chosen(CARD, gpu_expert_cache=value)
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)


def test_a_cache_that_may_be_too_large_is_named() -> None:
    found = chosen(CARD, gpu_expert_cache="22")
    assert found.best is None
    assert "are for the cache of experts" in str(found.lacks)
