"""Which names in config.json explain an error of vLLM. tests/settings has whole configurations."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from lvllm.upstream import model_names

SOUND = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}


def explained(folder: Path, config: dict[str, Any], overrides: Any = None, said: str = "") -> str:
    file = folder / "config.json"
    file.write_text(json.dumps(config))
    line = model_names.explain(folder, overrides or {}, said)
    return "" if line is None else line.removeprefix(f"{file}: ")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ""),
        ({"architectures": ["New", "Qwen3MoeForCausalLM"]}, ""),
        ({"architectures": ["New"]}, 'architectures=["New"] is not allowed'),
        ({"architectures": None}, ""),  # transformers knows the class of this type
        ({"architectures": None, "model_type": "step3_text"}, "has no architectures"),
        ({"model_type": "step3_text"}, ""),  # which vLLM alone knows
        ({"model_type": "new"}, "model_type='new' is not allowed"),
        ({"model_type": None}, "has no model_type"),
        ({"model_type": "new", "auto_map": {"AutoConfig": "code.Config"}}, ""),
        ({"model_type": None, "speculators_config": {}}, ""),
    ],
    ids=str,
)
def test_names_of_models(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    line = explained(tmp_path, SOUND | changes)
    assert line.startswith(said)
    assert bool(line) == bool(said)


def test_names_of_formats(tmp_path: Path) -> None:
    error = "Unknown quantization method:\n new"
    for place in ({}, {"quantization_config": None}):
        assert explained(tmp_path, SOUND | place, said=error) == ""
    new = {"quantization_config": {"quant_method": "new"}}
    for config, key in (
        (SOUND | new, "quantization_config"),
        (SOUND | {"compression_config": {"quant_method": "new"}}, "compression_config"),
        (SOUND | {"text_config": new}, "text_config.quantization_config"),
    ):
        line = explained(tmp_path, config, said=error)
        assert line.startswith(f"{key}.quant_method='new' is not allowed")
        assert explained(tmp_path, config, said="max_model_len is too long") == ""
    known = SOUND | {"quantization_config": {"quant_method": "FP8"}}
    assert (
        explained(tmp_path, known, said=error)
        == f"quantization_config: {error.replace(chr(10), '')}"
    )


def test_overrides_count(tmp_path: Path) -> None:
    wrong = SOUND | {"model_type": "new"}
    assert explained(tmp_path, wrong, {"model_type": "qwen3_moe"}) == ""
    assert explained(tmp_path, SOUND, {"model_type": "new"}).startswith("model_type='new'")
    assert explained(tmp_path, wrong, lambda config: config) == ""


def test_folders_without_a_config(tmp_path: Path) -> None:
    assert model_names.explain(tmp_path, {}, "anything") is None
