"""Experts of gpt-oss, experts without a gate, and experts of vLLM's Transformers backend.

They are not vLLM's usual experts. tests/e2e/test_exactness.py compares their plain models, too. The
tests here compare their packings, options and parallel runs with transformers in float32.
"""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.generate import Answers, Model, generate_all
from tests.e2e.test_exactness import Prompts, check_against_reference, prompts
from tests.models import gpt_oss
from tests.models.make import make
from tests.models.quantize import SCHEMES, quantize

Case = tuple[Path, Prompts, Answers]

# The values reach this limit of 0.9. A test would not notice whether a limit of 7 is applied.
LIMITED = {"swiglu_alpha": 1.2, "swiglu_limit": 0.9}
LATENT = {
    "layers_block_type": ["linear_attention", "moe", "mlp", "full_attention", "moe"],
    "num_hidden_layers": 5,
    "moe_latent_size": 64,
}
GATELESS = {"moe_intermediate_size": 128}


@pytest.fixture(scope="module")
def seed() -> int:
    drawn = random.randrange(1 << 30)
    print(f"seed {drawn}")
    return drawn


@pytest.fixture(scope="module")
def whole(seed: int, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    tmp = tmp_path_factory.mktemp("whole")
    limited = make("gpt_oss", tmp / "gpt_oss", seed, **LIMITED)
    latent = make("nemotron_h", tmp / "latent", seed, **LATENT)
    gateless = make("nemotron_h", tmp / "gateless", seed, **GATELESS)
    qwen = make("qwen3_moe", tmp / "qwen", seed)
    models: dict[str, Model] = {
        "gpt_oss_limited": (limited, limited, {}),
        "gpt_oss_mxfp4": (*gpt_oss.pack(limited, tmp / "mxfp4"), {}),
        "nemotron_h_latent": (latent, latent, {}),
        "qwen3_moe_transformers_backend": (qwen, qwen, {"model_impl": "transformers"}),
    }
    for scheme in ("modelopt_fp8", "modelopt_nvfp4"):
        packed = quantize(gateless, SCHEMES[scheme], tmp / scheme)
        models[f"nemotron_h_{scheme}"] = (*packed, {})
    return generate_all(models, prompts(seed), max_tokens=12)


@pytest.mark.parametrize(
    "name",
    [
        "gpt_oss_limited",
        "gpt_oss_mxfp4",
        "nemotron_h_latent",
        "nemotron_h_modelopt_fp8",
        "nemotron_h_modelopt_nvfp4",
        "qwen3_moe_transformers_backend",
    ],
)
def test_whole(name: str, whole: dict[str, Case], record: Callable[..., None]) -> None:
    found = check_against_reference(*whole[name])
    family, _, format = name.rpartition("_modelopt_")
    if name == "gpt_oss_mxfp4":
        family, format = "gpt_oss", "mxfp4"
    if family:
        record("models", name, family=family, format=format, picture=False, **found)


def test_gpt_oss_mxfp4_in_two_processes(seed: int, tmp_path: Path) -> None:
    plain = make("gpt_oss", tmp_path / "plain", seed, intermediate_size=128)
    models: dict[str, Model] = {
        "shares": (*gpt_oss.pack(plain, tmp_path / "mxfp4"), {"tensor_parallel_size": 2})
    }
    answered = generate_all(models, prompts(seed), max_tokens=12)
    check_against_reference(*answered["shares"])
