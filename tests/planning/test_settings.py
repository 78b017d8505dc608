"""The settings that a plan prints."""

import shlex

import pytest
import yaml

from benchmarks.plans.models import shape_of
from lvllm.planning.choice import choose
from lvllm.planning.filling import Given
from lvllm.planning.placement import Load
from lvllm.planning.settings import as_command, as_yaml, settings_of
from lvllm.settings.config_file import section
from lvllm.settings.resolving import resolve
from lvllm.settings.use_weight import UseWeight
from lvllm.units import GIB
from tests.planning.made_up import machine, model
from tests.settings.test_example_configs import serve_parser

MODEL = model()
MACHINES = [
    machine(),
    machine(gpus=1),
    machine(gpus=2, gpu_gib=12, gpu="h100", cores=2, isa="avx2"),
    machine(gpus=1, gpu_gib=8),
]
NAME = "folder with spaces: and #more"


@pytest.mark.parametrize("use", [UseWeight.INT4, UseWeight.INT8, UseWeight.FP8])
@pytest.mark.parametrize("here", MACHINES)
def test_lvllm_takes_the_file_and_the_command_alike(here, use) -> None:  # type: ignore[no-untyped-def]
    load = Load(prompt=8192, context=16384, users=3)
    plan = choose(MODEL, here, load, experts=[use], int8_linear=True)
    for candidate in plan.candidates:
        chosen = settings_of(MODEL, here, candidate)
        file = yaml.safe_load(as_yaml(NAME, chosen))
        assert file["model"] == NAME
        words = shlex.split(as_command(NAME, chosen))
        start = words.index("vllm")
        assert words[start : start + 3] == ["vllm", "serve", NAME]
        environ = dict(word.split("=", 1) for word in words[:start])
        from_file, from_command = resolve({}, section(file)), resolve(environ, None)
        for key, setting in from_file.items():
            if key == "moe_use_weight":
                assert setting.value.everywhere == use
            if key != "moe_numa_enabled":
                assert setting.value == from_command[key].value, key
        options = dict(zip(words[start + 3 :: 2], words[start + 4 :: 2], strict=True))
        for key in options:
            assert str(file[key.removeprefix("--")]) == options[key]


def test_layers_are_named_by_the_models_own_numbers() -> None:
    here = machine(gpus=1, gpu_gib=12)
    best = choose(MODEL, here, Load(), given=Given(cache=0.0)).best
    assert best is not None
    chosen = {one.key: one.value for one in settings_of(MODEL, here, best)}
    layers = chosen["additional_config.lvllm.gpu_resident_moe_layers"]
    assert layers == f"1-{best.how.resident}"  # Layer 0 is dense.


@pytest.mark.parametrize(
    ("name", "gpus", "whole"),
    [
        ("GLM-4.5-Air-FP8", 2, True),  # 1408 rows: parts of 704 are 5.5 blocks of 128
        ("GLM-4.5-Air-FP8", 1, False),
        ("Qwen3-235B-A22B-FP8", 4, False),  # 1536 rows
        ("Qwen3-30B-A3B", 4, False),  # in bf16, without blocks
        ("gpt-oss-120b", 4, True),  # 2880 rows, in blocks of 32
        ("gpt-oss-120b", 2, False),
    ],
)
def test_gpus_have_whole_experts_where_parts_would_not_be_whole_blocks(
    name: str, gpus: int, whole: bool
) -> None:
    of, here = shape_of(name), machine(gib=1024, gpus=gpus, gpu_gib=24)
    best = choose(of, here, Load()).best
    assert best is not None
    assert best.how.on_gpu
    chosen = settings_of(of, here, best)
    assert ("enable-expert-parallel" in [one.key for one in chosen]) == whole
    words = shlex.split(as_command(name, chosen))
    parsed = serve_parser().parse_args(words[words.index("serve") :])
    assert bool(parsed.enable_expert_parallel) == whole
    assert parsed.tensor_parallel_size == gpus
    assert yaml.safe_load(as_yaml(name, chosen)).get("enable-expert-parallel", False) == whole


@pytest.mark.parametrize("gpus", [1, 2])
def test_the_cache_of_experts_is_in_gib_of_each_gpu(gpus: int) -> None:
    of, here = model(layers=24, experts=128), machine(gib=128, gpus=gpus, gpu_gib=16)
    best = choose(of, here, Load()).best
    assert best is not None
    chosen = {one.key: one for one in settings_of(of, here, best)}
    assert "additional_config.lvllm.gpu_resident_moe_layers" not in chosen
    told = chosen["additional_config.lvllm.gpu_expert_cache"]
    assert 0 < told.value * GIB == pytest.approx(best.how.cache)
    # Whether the setting is one number or written with a digit more, no slot is lost by it.
    (read,) = resolve({"LVLLM_GPU_EXPERT_CACHE": str(told.value)}, None)["gpu_expert_cache"].value
    each = 10_000_000 * 2 / gpus
    assert read // each == best.how.cached_experts(of, gpus)
    assert f"{best.how.cached_experts(of, gpus)} experts" in told.why


def test_the_cache_holds_the_contexts() -> None:
    best = choose(MODEL, machine(), Load(users=8, context=10000)).best
    assert best is not None
    chosen = {one.key: one.value for one in settings_of(MODEL, machine(), best)}
    assert int(chosen["kv-cache-memory-bytes"]) >= 8 * MODEL.cache_bytes(10000)
