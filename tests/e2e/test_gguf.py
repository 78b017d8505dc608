"""GGUF files through LvLLM, compared with transformers on the values that the files have."""

import random
import re
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Type

from tests.e2e.generate import ONE_PROCESS, generate
from tests.e2e.server import fail_to_serve
from tests.e2e.test_exactness import check_against_reference, prompts
from tests.models.gguf import dequantised, write
from tests.models.gguf_families import longrope
from tests.models.make import make

EXPERTS = {
    0: Type.Q8_0,
    1: Type.Q4_0,
    2: Type.MXFP4,
    3: Type.F16,
    4: Type.BF16,
    5: Type.F32,
}
"""The types of each layer's experts."""
ENGINE = {0: "int8", 1: "int4", 2: "mxfp4", 3: "fp16", 4: "bf16", 5: "bf16"}
"""lk's formats of the same layers: those of the file, but for float32."""
OTHERS = {
    "token_embd": Type.Q8_0,
    "output": Type.Q5_1,
    "attn_q": Type.Q5_0,
    "attn_k": Type.Q4_1,
    "attn_v": Type.Q8_0,
    "attn_output": Type.F16,
    "ffn_gate_inp": Type.BF16,
    "ffn_gate_shexp": Type.Q5_0,
    "ffn_up_shexp": Type.Q8_0,
    "ffn_down_shexp": Type.Q4_1,
    "attn_kv_b": Type.Q5_0,
    "attn_k_b": Type.Q8_0,
    "attn_v_b": Type.Q5_1,
    "ssm_in": Type.Q8_0,
    "ssm_out": Type.Q5_0,
}


SIZES = {"moe_intermediate_size": 64, "mlp_only_layers": []}
"""Rows of whole blocks of 32 weights, on each of two ranks as well."""


BLOCKS = {
    0: (Type.Q4_K, Type.Q4_K, Type.Q6_K),
    1: (Type.Q5_K, Type.Q5_K, Type.Q5_K),
    2: (Type.Q2_K, Type.Q2_K, Type.Q3_K),
    3: (Type.Q3_K, Type.Q8_0, Type.Q8_0),
    4: (Type.Q6_K, Type.Q4_K, Type.Q4_0),
    5: (Type.Q4_1, Type.F32, Type.Q5_1),
    6: (Type.IQ4_XS, Type.IQ4_XS, Type.IQ4_NL),
    7: (Type.Q5_0, Type.Q5_0, Type.IQ4_XS),
    8: (Type.IQ2_XXS, Type.IQ2_XXS, Type.IQ3_XXS),
    9: (Type.IQ2_XS, Type.IQ2_XS, Type.IQ2_S),
    10: (Type.IQ3_S, Type.IQ3_S, Type.IQ1_M),
    11: (Type.IQ1_S, Type.IQ2_S, Type.IQ3_S),
}
"""The types of gate, up and down in each layer of a model in blocks."""
PROJECTIONS = ("gate", "up", "down")
RESIDENT = (0, 2, 5, 8, 11)
"""Layers of this model that a device holds in a second run."""


def kind(name: str) -> Type:
    """The type of each tensor, by its name in the file."""
    found = re.match(r"(?:blk\.(\d+)\.)?(\w+)", name)
    assert found is not None
    if name.endswith("_exps.weight"):
        return EXPERTS[int(found[1])]
    return OTHERS.get(found[2], Type.F32)


def in_blocks(name: str) -> Type:
    """The same for a model in blocks."""
    found = re.match(r"blk\.(\d+)\.ffn_(\w+)_exps.weight", name)
    return BLOCKS[int(found[1])][PROJECTIONS.index(found[2])] if found else kind(name)


def with_own_up(name: str) -> Type:
    """The types of a model whose up projections have others than gate, in blocks of 32."""
    return Type.Q5_0 if "ffn_up_exps.weight" in name else kind(name)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def seed() -> int:
    drawn = random.randrange(1 << 30)
    print(f"seed {drawn}")
    return drawn


def test_a_file_with_experts_of_every_type(seed: int, tmp_path: Path) -> None:
    plain = make("qwen3_moe", tmp_path / "plain", seed, num_hidden_layers=6, **SIZES)
    file = write(plain, tmp_path / "model.gguf", kind)
    values = dequantised(plain, tmp_path / "values", kind)
    asked = prompts(seed)
    job = {"model": str(file), "prompts": asked, "max_tokens": 8, "formats": True}
    (answers,) = generate([job], environment=ONE_PROCESS)
    formats = {int(re.findall(r"\d+", name)[0]): how for name, how in answers[0]["formats"].items()}
    assert formats == ENGINE
    check_against_reference(values, asked, answers)


FAMILIES: dict[str, dict[str, object]] = {
    "qwen2_moe": {
        "num_hidden_layers": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 96,
    },
    "deepseek_v3": {"num_hidden_layers": 2},
    "gpt_oss": {"num_hidden_layers": 3},  # the third one is in MXFP4, as published files are
    "gemma4": {"moe_intermediate_size": 64},
    "nemotron_h": {"moe_intermediate_size": 64},
    # Stock vLLM and transformers differ in contexts that are longer than the original ones.
    "phimoe": {"intermediate_size": 64, "rope_parameters": longrope(4096)},
}
"""One of each kind that vLLM loads in a way of its own. `tests/checkpoint/test_gguf_families.py`
compares the configuration and the tensors of all families."""


def test_other_families(seed: int, tmp_path: Path) -> None:
    asked = prompts(seed)
    values, jobs = [], []
    for name, sizes in FAMILIES.items():
        plain = make(name, tmp_path / name, seed, **sizes)
        file = write(plain, tmp_path / f"{name}.gguf", kind)
        values.append(dequantised(plain, tmp_path / f"{name}-values", kind))
        jobs.append({"model": str(file), "prompts": asked, "max_tokens": 8})
    answers = generate(jobs, environment=ONE_PROCESS, together=True)
    for folder, answered in zip(values, answers, strict=True):
        check_against_reference(folder, asked, answered)


def test_a_server_that_does_not_start_says_why_in_one_line(seed: int, tmp_path: Path) -> None:
    plain = make("gpt_oss", tmp_path / "plain", seed, num_hidden_layers=1)
    file = write(plain, tmp_path / "model.gguf", with_own_up)
    code, said = fail_to_serve(str(file))
    assert code == 1
    assert said.rstrip().endswith("--tokenizer DIR gives one")
    code, said = fail_to_serve(str(file), "--skip-tokenizer-init")
    assert code == 1
    last = said.rstrip().splitlines()[-1]
    assert "tensor 'blk.0.ffn_up_exps.weight': is Q5_0, and ffn_gate_exps is Q8_0" in last
    assert "Traceback" not in said


def test_blocks_and_projections_of_two_types(seed: int, tmp_path: Path) -> None:
    """Activations keep 16 bits, so that the bound is that of the other formats."""
    sizes = {"hidden_size": 256, "moe_intermediate_size": 256, "mlp_only_layers": []}
    plain = make("qwen3_moe", tmp_path / "plain", seed, num_hidden_layers=len(BLOCKS), **sizes)
    file = write(plain, tmp_path / "model.gguf", in_blocks)
    values = dequantised(plain, tmp_path / "values", in_blocks)
    asked = prompts(seed)
    job = {"model": str(file), "prompts": asked, "max_tokens": 8, "formats": True}
    settings = {"lvllm": {"accelerator": "host", "gpu_resident_moe_layers": [*RESIDENT]}}
    answers = generate(
        [job, job | {"additional_config": settings}],
        environment=ONE_PROCESS | {"LK_ACTIVATION_BITS": "16"},
    )
    for answered, resident in zip(answers, ((), RESIDENT), strict=True):
        assert [*answered[0]["formats"].values()] == [
            gate.name.lower() for layer, (gate, *_) in BLOCKS.items() if layer not in resident
        ]
        check_against_reference(values, asked, answered)


def test_parts_of_a_model_on_two_ranks(seed: int, tmp_path: Path) -> None:
    """Each rank takes its rows of gate and up, and its blocks of down. The folder is named.

    Gate and up have different types.
    """
    sizes = {"num_hidden_layers": 3, "tie_word_embeddings": True, **SIZES}
    plain = make("qwen3_moe", tmp_path / "plain", seed, **sizes)
    (tmp_path / "folder").mkdir()
    write(plain, tmp_path / "folder" / "model.gguf", with_own_up, parts=3)
    values = dequantised(plain, tmp_path / "values", with_own_up)
    asked = prompts(seed)
    job = {"model": str(tmp_path / "folder"), "prompts": asked, "max_tokens": 8}
    (answers,) = generate([job | {"tensor_parallel_size": 2}])
    check_against_reference(values, asked, answers)
