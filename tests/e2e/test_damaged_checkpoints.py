"""Damaged checkpoints end `vllm serve` in one line, whichever process finds it."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lvllm.export import export
from tests.e2e.server import fail_to_serve
from tests.models.gpt_oss import pack
from tests.models.make import make
from tests.models.quantize import SCHEMES, quantize

Tensors = dict[str, torch.Tensor]
EXPERT = "model.layers.2.mlp.experts.5.down_proj"
ROWS = "model.layers.2.mlp.experts.5.up_proj"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "model"
    return make("qwen3_moe", folder, mlp_only_layers=[], moe_intermediate_size=96)


def truncated(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 100)


def changed(change: Callable[[Tensors], None]) -> Callable[[Path], None]:
    """A checkpoint with other tensors than it should have."""

    def damage(file: Path) -> None:
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return damage


def cut(tensors: Tensors) -> None:
    tensors[f"{EXPERT}.weight"] = tensors[f"{EXPERT}.weight"][:-1].clone()


def infinite(tensors: Tensors) -> None:
    """In a row of the first of two ranks; the other one loads its share and waits for it."""
    tensors[f"{ROWS}.weight_scale"][3] = torch.inf


def refused(model: Path, *arguments: str) -> str:
    """The one line that the server ends with; behind it there may be one of Python's on semaphores
    that workers left behind.
    """
    settings = ["--dtype=bfloat16", "--enforce-eager", "--max-model-len=128"]
    settings += ["--skip-tokenizer-init", f"--kv-cache-memory-bytes={64 << 20}", *arguments]
    code, errors = fail_to_serve(str(model), *settings)
    assert code == 1
    assert "Traceback" not in errors, errors
    (line,) = [line for line in errors.splitlines() if "lvllm: " in line]
    assert line.startswith("lvllm: ")
    after = errors.strip().rpartition(line)[2]
    assert not after or "resource_tracker" in after, errors
    return line


def copy(model: Path, folder: Path, damage: Callable[[Path], None]) -> tuple[Path, Path]:
    """A damaged copy, and the file that the damage is in."""
    shutil.copytree(model, folder)
    file = folder / "model.safetensors"
    damage(file)
    return folder, file


def test_a_truncated_file_is_found_before_anything_starts(plain: Path, tmp_path: Path) -> None:
    model, file = copy(plain, tmp_path / "model", truncated)
    line = refused(model)
    assert f"{file}: tensor " in line
    assert "truncated" in line


@pytest.mark.parametrize(
    ("option", "made", "said"),
    [
        ("--chat-template", os.mkfifo, "not a regular file"),
        ("--tokenizer", os.mkfifo, "is no folder"),
        ("--generation-config", os.mkdir, "has no generation_config.json or config.json"),
        ("--hf-config-path", os.mkdir, "has no config.json or params.json"),
    ],
)
def test_files_of_options(
    option: str, made: Callable[[Path], None], said: str, plain: Path, tmp_path: Path
) -> None:
    given = tmp_path / "given"
    made(given)
    line = refused(plain, option, str(given))
    assert str(given) in line
    assert line.endswith(said)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ('{"temperature": "hot"}', "temperature='hot' is not allowed: a number is wanted"),
        ('{"top_p": 7}', "top_p=7 is not allowed: top_p must be in (0, 1]"),
        ("[1]", "override_generation_config=[1] is not allowed: Input should be a valid dict"),
    ],
)
def test_sampling_parameters_by_default(given: str, said: str, plain: Path) -> None:
    assert said in refused(plain, "--override-generation-config", given)


def test_an_unknown_model_ends_before_anything_starts(plain: Path, tmp_path: Path) -> None:
    model, _ = copy(plain, tmp_path / "model", lambda file: None)
    config = model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "new"}))
    line = refused(model)
    assert line.startswith(f"lvllm: {config}: model_type='new' is not allowed: neither vLLM")


def test_a_wrong_shape_is_found_by_the_engine(plain: Path, tmp_path: Path) -> None:
    model, file = copy(plain, tmp_path / "model", changed(cut))
    line = refused(model)
    assert f"{file}: tensor '{EXPERT}.weight': bfloat16 [127, 96]: does not fit the model" in line


def scalar(data: torch.Tensor) -> torch.Tensor:
    return data.flatten()[0]


def longer(data: torch.Tensor) -> torch.Tensor:
    return torch.cat([data, data[:, :1]], 1)


@pytest.mark.parametrize(
    ("model", "damage"),
    [
        ("exported", scalar),
        ("exported", longer),
        ("gpt_oss", longer),
        ("gpt_oss_mxfp4", scalar),
    ],
)
def test_wrong_shapes_in_other_formats(
    model: str,
    damage: Callable[[torch.Tensor], torch.Tensor],
    plain: Path,
    tmp_path: Path,
) -> None:
    sound = tmp_path / "sound"
    if model == "exported":
        export(plain, sound, format="mxfp4", quiet=True)
        name = "model.layers.1.mlp.experts.4.gate_proj.weight_packed"
    elif model == "gpt_oss":
        make("gpt_oss", sound)
        name = "model.layers.0.mlp.experts.gate_up_proj"
    else:
        sound, _ = pack(make("gpt_oss", tmp_path / "plain"), sound)
        name = "model.layers.0.mlp.experts.down_proj_blocks"

    def change(tensors: Tensors) -> None:
        tensors[name] = damage(tensors[name]).clone()

    damaged, file = copy(sound, tmp_path / "model", changed(change))
    line = refused(damaged)
    has = list(load_file(file)[name].shape)
    wanted = list(load_file(sound / file.name)[name].shape)
    assert f"{file}: tensor '{name}': " in line
    assert f"does not fit the model: has {has} where the model takes {wanted}" in line


def test_infinite_scales_are_found_by_a_worker(plain: Path, tmp_path: Path) -> None:
    quantised, _ = quantize(plain, SCHEMES["compressed_fp8_channels"], tmp_path / "sound")
    model, file = copy(quantised, tmp_path / "model", changed(infinite))
    line = refused(model, "--tensor-parallel-size=2")
    assert f"{file}: tensor '{ROWS}.weight_scale': 1 of its scales are NaN or infinite" in line
