"""What is tried around a plan."""

from dataclasses import replace
from pathlib import Path

import pytest

from lvllm.engine.weight_formats import FORMATS
from lvllm.machine.cpus import default_threads, this_machine
from lvllm.machine.facts import limits
from lvllm.planning.machine import Machine
from lvllm.planning.shape import ModelShape
from lvllm.serving.defaults import choose
from lvllm.serving.given import read
from lvllm.settings.use_weight import UseWeight
from lvllm.settings.variables import BY_KEY, parse
from lvllm.tuning.knobs import Allowed, knobs
from tests.planning.made_up import machine, model

EXPERTS = (UseWeight.INT4, UseWeight.INT8, UseWeight.FP8)
ALL = Allowed(EXPERTS, int8_linear=True, activation_bits=True)


def tried(
    on: Machine,
    of: ModelShape | None = None,
    allowed: Allowed = ALL,
    environ: dict[str, str] | None = None,
) -> dict[str, tuple[str, ...]]:
    given = read(["m", "--max-num-batched-tokens", "4096"], environ or {})
    plan = choose(of or model(), on, given)
    assert plan.best is not None
    return {knob.name: knob.values for knob in knobs(given, plan, plan.best, allowed)}


def test_results_change_only_if_they_may() -> None:
    found = tried(machine(), allowed=Allowed())
    assert set(found) <= {"LK_THREADS", "LK_THREAD_BINDING"}
    for experts in (EXPERTS, EXPERTS[1:2]):
        assert tried(machine(), allowed=Allowed(experts))["LVLLM_MOE_USE_WEIGHT"] == experts
    assert tried(machine(), allowed=Allowed(int8_linear=True))["LVLLM_DENSE_WEIGHT"] == ("INT8",)


def test_experts_of_8_bits_are_rounded_to_4_only() -> None:
    found = tried(machine(), model(bits=8.125, format="fp8"))
    assert found["LVLLM_MOE_USE_WEIGHT"] == ("INT4",)
    assert found["LK_ACTIVATION_BITS"] == ("16",)  # int4 has 8 by default.


def test_formats_that_have_no_choice() -> None:
    bits = Allowed(activation_bits=True)
    assert "LK_ACTIVATION_BITS" not in tried(machine(), allowed=bits)  # bf16
    nvfp4 = model(bits=4.5, format="nvfp4")
    # Experts of 4.5 bits are not rounded to 4.5 bits.
    assert "LVLLM_MOE_USE_WEIGHT" not in tried(machine(), nvfp4)
    usual, other = FORMATS["nvfp4"].activation_bits
    assert tried(machine(), nvfp4, bits)["LK_ACTIVATION_BITS"] == (str(other),)
    assert usual != other


def test_threads_of_this_machine() -> None:
    usual = default_threads(this_machine(), 1, limits.cpu_quota())
    for value in tried(machine()).get("LK_THREADS", ()):
        assert int(value) not in (0, usual)


def test_what_was_given_stays() -> None:
    environ = {"LK_THREAD_BINDING": "CPU_CORE", "LVLLM_DENSE_WEIGHT": "KEEP"}
    found = tried(machine(), environ=environ)
    assert "LK_THREAD_BINDING" not in found
    assert "LVLLM_DENSE_WEIGHT" not in found
    assert "LK_THREADS" in found


@pytest.mark.parametrize("gpus", [1, 2])
def test_beside_a_gpu(gpus: int) -> None:
    on = machine(gib=512, gpus=gpus, gpu="rtx-3090")
    of = model(layers=24, experts=128, expert=20_000_000)
    layers = {"LVLLM_GPU_EXPERT_CACHE": "0"}
    found = tried(on, of, environ=layers)
    assert "LVLLM_DENSE_WEIGHT" not in found
    resident = found["LVLLM_GPU_RESIDENT_MOE_LAYERS"]
    variable = BY_KEY["gpu_resident_moe_layers"]
    counts = [len(parse(variable, value, variable.name)) for value in resident]
    assert counts == sorted(counts, reverse=True)
    plan = choose(of, on, read(["m", "--max-num-batched-tokens", "4096"], layers))
    assert plan.best is not None
    assert plan.best.how.resident not in counts
    if plan.best.how.streamed_from is not None:
        for value in found["LVLLM_GPU_PREFILL_MIN_BATCH_SIZE"]:
            assert 1 <= int(value) <= 4096
    whole = replace(of, layers=of.layers[:2])
    assert "LVLLM_GPU_PREFETCH_WINDOW" not in tried(on, whole)


def test_a_cache_of_experts_is_tried_larger_and_smaller() -> None:
    on, of = machine(gib=512, gpus=1), model(layers=24, experts=128, expert=20_000_000)
    plan = choose(of, on, read(["m", "--max-num-batched-tokens", "4096"], {}))
    assert plan.best is not None
    planned = plan.best.how.cache
    found = tried(on, of)
    assert "LVLLM_GPU_RESIDENT_MOE_LAYERS" not in found
    variable = BY_KEY["gpu_expert_cache"]
    larger, smaller = (
        parse(variable, value, variable.name)[0] for value in found["LVLLM_GPU_EXPERT_CACHE"]
    )
    assert 0 < smaller < planned < larger < 1.5 * planned
    for name, value in (("GPU_EXPERT_CACHE", "4"), ("GPU_RESIDENT_MOE_LAYERS", "1-2")):
        assert f"LVLLM_{name}" not in tried(on, of, environ={f"LVLLM_{name}": value})


def test_the_names_are_settings(tmp_path: Path) -> None:
    on = machine(gib=512, gpus=1)
    for name, values in tried(on, model(layers=24, experts=128, expert=20_000_000)).items():
        variable = next(one for one in BY_KEY.values() if one.name == name)
        for value in values:
            parse(variable, value, name)  # Raises for what is not allowed.
