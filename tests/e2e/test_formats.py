"""Quantised checkpoints through LvLLM, compared with transformers in float32.

The reference computes with the values that the quantised tensors mean.
"""

import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.generate import ONE_PROCESS, Answers, Job, Model, generate, generate_all
from tests.e2e.test_exactness import Prompts, check_against_reference, prompts
from tests.models.make import make
from tests.models.quantize import (
    EXPERTS,
    MIXED,
    SCHEMES,
    SECOND_LAYER,
    as_int4,
    quantize,
)

# These experts are computed in another format than the one they are stored in. The checkpoint
# "plain" is stored as the model was made.
CONVERTED = (
    "plain:INT4",
    "fp8_tensor:TO_DTYPE",
    "compressed_int8:INT4",
    "modelopt_nvfp4:TO_DTYPE",
    "awq:TO_DTYPE",
    "gptq_int4_act_order:INT4",
    "fp8_blocks_and_bf16:INT4",
    "compressed_int4_and_bf16:INT4",
    "compressed_int4_and_bf16:TO_DTYPE",
)
# These have a format for each layer, by BY_LAYER.
RULED = ("plain", "fp8_blocks_and_bf16", "compressed_int4_and_bf16")
BY_LAYER = [{r"layers\.0\.": "KEEP"}, {r"mlp\.experts$": "INT4"}]
# There is one case for each way in which a process may cut its share out of a checkpoint.
SHARDED = (
    "awq",
    "compressed_int4_zero_points",
    "compressed_nvfp4",
    "fp8_blocks:INT4",
    "gptq_int4_act_order",
)

Case = tuple[Path, Prompts, Answers]


def prepare(plain: Path, case: str, folder: Path) -> Model:
    """Make the checkpoint of a case, which is "SCHEME" or "SCHEME:LVLLM_MOE_USE_WEIGHT".

    "RULES" stands for BY_LAYER.

    The result is this checkpoint, one with the values that its experts are computed with, and
    arguments of `vllm.LLM`.
    """
    scheme, _, use_weight = case.partition(":")
    quantized = values = plain
    if scheme != "plain":
        quantized, values = quantize(plain, (SCHEMES | MIXED)[scheme], folder)
    section: dict[str, Any] = {"lvllm": {"moe_use_weight": use_weight}} if use_weight else {}
    if use_weight == "RULES":
        section = {"lvllm": {"moe_use_weight": BY_LAYER}}
        values = as_int4(values, folder / "int4", SECOND_LAYER)
    if use_weight == "INT4":
        # Experts of a mixed checkpoint that have 4 bits already stay as they are.
        what = SECOND_LAYER if scheme == "compressed_int4_and_bf16" else EXPERTS
        values = as_int4(values, folder / "int4", what)
    return quantized, values, {"additional_config": section, "formats": use_weight == "RULES"}


def run(plain: Path, cases: Iterable[str], seed: int, tmp: Path, **job: Any) -> dict[str, Case]:
    """Generate the answers of every case; `job` has further arguments that hold for all."""
    models = {case: prepare(plain, case, tmp / case) for case in cases}
    return generate_all(models, prompts(seed), max_tokens=8, **job)


@pytest.fixture(scope="module")
def seed() -> int:
    drawn = random.randrange(1 << 30)
    print(f"seed {drawn}")
    return drawn


@pytest.fixture(scope="module")
def generated(seed: int, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    tmp = tmp_path_factory.mktemp("whole")
    # The 128 rows of gate, or of up, are one block of scales. The 320 columns are two and a half.
    sizes = {"hidden_size": 320, "moe_intermediate_size": 128, "num_key_value_heads": 4}
    layers = {"num_hidden_layers": 2, "mlp_only_layers": []}
    plain = make("qwen3_moe", tmp / "plain", seed, **layers, **sizes)
    ruled = [f"{scheme}:RULES" for scheme in RULED]
    return run(plain, (*SCHEMES, *MIXED, *CONVERTED, *ruled), seed, tmp)


@pytest.fixture(scope="module")
def sharded(seed: int, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    tmp = tmp_path_factory.mktemp("sharded")
    sizes = {"hidden_size": 256, "moe_intermediate_size": 256}
    layers = {"num_hidden_layers": 2, "mlp_only_layers": []}
    plain = make("qwen3_moe", tmp / "plain", seed, **layers, **sizes)
    return run(plain, SHARDED, seed, tmp, tensor_parallel_size=2)


@pytest.mark.parametrize("case", sorted(SCHEMES))
def test_quantised_experts(
    case: str, generated: dict[str, Case], record: Callable[..., None]
) -> None:
    record("formats", case, **check_against_reference(*generated[case]))


@pytest.mark.parametrize("case", sorted(MIXED))
def test_layers_that_are_not_alike(
    case: str, generated: dict[str, Case], record: Callable[..., None]
) -> None:
    record("formats", case, **check_against_reference(*generated[case]))


@pytest.mark.parametrize("case", CONVERTED)
def test_converted_experts(
    case: str, generated: dict[str, Case], record: Callable[..., None]
) -> None:
    record("formats", case, **check_against_reference(*generated[case]))


@pytest.mark.parametrize(("scheme", "kept"), list(zip(RULED, ("bf16", "fp8", "int4"), strict=True)))
def test_formats_by_rules(scheme: str, kept: str, generated: dict[str, Case]) -> None:
    """The first layer is computed as it is stored, and the second one in 4 bits."""
    values, asked, answers = generated[f"{scheme}:RULES"]
    names = [f"model.layers.{layer}.mlp.experts" for layer in (0, 1)]
    assert answers[0]["formats"] == dict(zip(names, (kept, "int4"), strict=True))
    check_against_reference(values, asked, answers)


@pytest.mark.parametrize("case", SHARDED)
def test_shares_of_two_processes(case: str, sharded: dict[str, Case]) -> None:
    check_against_reference(*sharded[case])


def test_vllms_options_are_the_setting(qwen3_moe: Path, seed: int) -> None:
    """vLLM's --quantization leads to the bits of LVLLM_MOE_USE_WEIGHT; linear layers are vLLM's."""
    job: Job = {"model": str(qwen3_moe), "prompts": prompts(seed), "max_tokens": 4}
    linear = {"quantization": "online", "quantization_config": {"linear": "fp8_per_channel"}}

    def setting(format: str) -> Job:
        return {"additional_config": {"lvllm": {"moe_use_weight": format}}}

    options: list[Job] = [
        {"quantization": "int8_per_channel_weight_only"},
        setting("INT8"),
        {"quantization": "fp8_per_channel"},
        linear | setting("FP8"),
    ]
    jobs = [job | option | {"formats": True} for option in options]
    int8, as_int8, fp8, as_fp8 = generate(jobs, environment=ONE_PROCESS, together=True)
    assert int8 == as_int8
    assert fp8 == as_fp8
    found = [set(answers[0]["formats"].values()) for answers in (int8, fp8)]
    assert found == [{"int8"}, {"fp8"}]
