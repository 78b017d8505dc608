"""Every family of GGUF files: its configuration, and its tensors as vLLM gets them."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file

from lvllm.checkpoint.gguf.architectures import ARCHITECTURES, architecture_of
from lvllm.checkpoint.gguf.fields import Fields
from lvllm.checkpoint.gguf.folder import present
from lvllm.checkpoint.gguf_headers import open_gguf
from lvllm.checkpoint.opening import open_checkpoint
from lvllm.loading.changes import undo_changes
from lvllm.loading.reader import Reader
from tests.checkpoint.test_gguf import refusal
from tests.models.gguf import dequantised, write
from tests.models.gguf_families import FAMILIES as WRITTEN
from tests.models.gguf_families import longrope
from tests.models.make import make


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """What two configurations have in different values: names with both values."""
    other: dict[str, Any] = {}
    for name, value in wanted.items():
        here = found.get(name)
        if isinstance(value, dict):
            if unlike := differences(here or {}, value):
                other[name] = unlike
        elif here != (pytest.approx(value) if isinstance(value, float) else value):
            other[name] = here, value
    return other


WITHOUT_MEANING = {"_name_or_path", "bos_token_id", "eos_token_id", "pad_token_id"}
"""The tokens are the tokenizer's, which these models lack."""
ONLY_OF_THE_FILE = {
    # Layers that draft tokens are left out.
    "glm4_moe_lite": {
        # vLLM computes it as a DeepSeek-V3.
        "architectures": (["DeepseekV3ForCausalLM"], ["Glm4MoeLiteForCausalLM"]),
        "model_type": ("deepseek_v3", "glm4_moe_lite"),
        "mlp_layer_types": (None, ["dense", "sparse", "sparse"]),
    },
    "glm4_moe": {"num_nextn_predict_layers": (0, 1)},
    "mixtral": {"head_dim": (32, None)},
    # No layer is dense, and the second one only divides the computation into pieces.
    "nemotron_h": {"intermediate_size": (21504, 192), "chunk_size": (128, 32)},
}
FAMILIES = (
    "qwen2_moe",
    "olmoe",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe_lite",
    "glm4_moe",
    "gemma4",
    "gpt_oss",
    "qwen3_next",
    "qwen3_5_moe_text",
    "nemotron_h",
    "minimax_m2",
    "mixtral",
    "phimoe",
)
CHANGES: dict[str, dict[str, Any]] = {"phimoe": {"rope_parameters": longrope()}}


def one_by_one(name: str, values: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """Some checkpoints have all experts of a layer in one tensor, but vLLM takes them singly, too.

    Those of gpt-oss are transposed, and vLLM takes them as its own parameters have them.
    """
    # vLLM takes both names of Nemotron's model.
    name = name.replace("backbone.embeddings", "model.embed_tokens").replace("backbone", "model")
    layer, of_experts, which = name.rpartition("experts.")
    if not of_experts or which not in ("gate_up_proj", "down_proj"):
        return [(name, values)]
    if ".mlp." in name:
        of_vllm = {"gate_up_proj": "w13_weight", "down_proj": "w2_weight"}[which]
        return [(f"{layer}experts.{i}.{of_vllm}", one.t()) for i, one in enumerate(values)]
    if which == "down_proj":
        return [(f"{layer}experts.{i}.down_proj.weight", one) for i, one in enumerate(values)]
    return [
        (f"{layer}experts.{i}.{part}_proj.weight", half)
        for i, one in enumerate(values)
        for part, half in zip(("gate", "up"), one.chunk(2), strict=True)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_its_configuration_names_and_values(family: str, tmp_path: Path) -> None:
    """Tensors that files have in parts or in another order come as they are in checkpoints."""

    plain = make(family, tmp_path / "plain", 7, **CHANGES.get(family, {}))
    weights = load_file(plain / "model.safetensors")
    for weight in weights.values():
        if weight.dim() == 1:  # norms are all 1 otherwise, and biases 0
            weight.add_(torch.rand_like(weight))
    save_file(weights, plain / "model.safetensors", {"format": "pt"})

    def kind(name: str) -> Type:
        small = ("norm", "exp", "bias", "sinks", "gate_inp", "ssm_a", "ssm_d", "conv1d", "scale")
        return Type.F32 if any(part in name for part in small) else Type.Q8_0

    file = write(plain, tmp_path / "model.gguf", kind)
    folder = present(file, tokenizer=False)
    found = transformers.AutoConfig.from_pretrained(folder).to_dict()
    wanted = transformers.AutoConfig.from_pretrained(plain).to_dict()
    unlike = differences(found, wanted)
    assert {name: unlike[name] for name in unlike if name not in WITHOUT_MEANING} == (
        ONLY_OF_THE_FILE.get(family, {})
    )
    values = load_file(dequantised(plain, tmp_path / "values", kind) / "model.safetensors")
    values = {name: tensor for whole in values.items() for name, tensor in one_by_one(*whole)}
    fields = Fields(open_gguf(file))
    tensors = open_checkpoint(folder).tensors.values()
    stored = ((tensor.source.info.name, tensor) for tensor in Reader([0]).read(tensors))
    for name, tensor in undo_changes(architecture_of(fields), fields, stored):
        read = torch.empty(tensor.shape, dtype=tensor.dtype)
        read.copy_(tensor)
        # Norms and what decays are computed in float32, in the file and from it.
        torch.testing.assert_close(read.float(), values.pop(name), rtol=1e-6, atol=1e-6)
    assert not values


def test_there_is_a_test_of_every_family() -> None:
    assert {WRITTEN[name].name for name in WRITTEN} == set(ARCHITECTURES)


@pytest.mark.parametrize(
    ("family", "fields", "said"),
    [
        (
            "glm4_moe",
            {"rope.dimension_sections": [4, 4, 4, 0]},
            "field 'glm4moe.rope.dimension_sections' is [4, 4, 4, 0]: models with pictures are not",
        ),
        ("glm4_moe", {"expert_gating_func": 1}, "field 'glm4moe.expert_gating_func' is 1: 2 is wa"),
        (
            "gpt_oss",
            {"rope.scaling.type": "none"},
            "field 'gpt-oss.rope.scaling.type' is 'none': y",
        ),
        ("gemma4", {"attention.head_count_kv": [2]}, "field 'gemma4.attention.head_count_kv' is"),
        ("mixtral", {"expert_count": None}, "has no field 'llama.expert_count'"),
        ("nemotron_h", {"ssm.time_step_rank": 0}, "field 'nemotron_h_moe.ssm.time_step_rank' is 0"),
    ],
)
def test_what_a_family_does_not_have(
    family: str, fields: dict[str, Any], said: str, tmp_path: Path
) -> None:
    plain = make(family, tmp_path / "plain", 7)
    file = write(plain, tmp_path / "model.gguf", lambda name: Type.F32, **fields)
    assert refusal(lambda: present(file, tokenizer=False), file).startswith(said)
