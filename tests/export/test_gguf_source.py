"""A GGUF file is exported as a checkpoint of the same values is."""

import json
import random
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file

from lvllm.export import export
from tests.export.test_export import load, run
from tests.models.gguf import dequantised, write
from tests.models.make import make

TYPES = {
    "ffn_gate_exps": Type.Q4_K,
    "ffn_up_exps": Type.Q4_K,
    "ffn_down_exps": Type.IQ3_XXS,
    "attn_q": Type.Q8_0,
    "token_embd": Type.Q5_1,
    "output": Type.BF16,
}


def kind(name: str) -> Type:
    """The type of each tensor, by its name in the file."""
    return TYPES.get(name.split(".")[-2], Type.F32)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A model whose experts have rows of whole blocks."""
    sizes = {"num_hidden_layers": 2, "hidden_size": 256, "moe_intermediate_size": 256}
    seed = random.randrange(1 << 30)
    return make("qwen3_moe", tmp_path / "plain", seed, mlp_only_layers=[], **sizes)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A folder with a tokenizer, which the files here have not."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    return folder


@pytest.mark.parametrize("parts", [1, 3])
def test_values(plain: Path, tokenizer: Path, tmp_path: Path, parts: int) -> None:
    file = write(plain, tmp_path / "model.gguf", kind, parts)
    values = dequantised(plain, tmp_path / "values", kind)
    weights = values / "model.safetensors"
    # All that is stored in float32 was bfloat16 before, and blocks become bfloat16.
    save_file({name: tensor.bfloat16() for name, tensor in load_file(weights).items()}, weights)

    export(values, tmp_path / "wanted", format="int8", quiet=True)
    export(file, tmp_path / "found", format="int8", tokenizer=tokenizer, quiet=True)
    wanted, found = load(tmp_path / "wanted"), load(tmp_path / "found")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].shape == tensor.shape, name
        assert found[name].to(tensor.dtype).equal(tensor), name
    configs = [
        json.loads((tmp_path / out / "config.json").read_text()) for out in ("wanted", "found")
    ]
    for key in ("architectures", "hidden_size", "num_hidden_layers", "quantization_config"):
        assert configs[0][key] == configs[1][key]


def test_the_tokenizer(plain: Path, tokenizer: Path, tmp_path: Path) -> None:
    file = write(plain, tmp_path / "model.gguf", kind)
    out, empty = tmp_path / "out", tmp_path / "empty"
    code, said = run(file, "-o", out, "--format", "int4")
    assert code == 1
    assert f"{file}: has no tokenizer: --tokenizer DIR gives one" in said
    code, said = run(file, "-o", out, "--format", "int4", "--tokenizer", empty)
    assert code == 1
    assert f"{empty} has no tokenizer" in said
    code, said = run(file, "-o", out, "--format", "int4", "--tokenizer", tokenizer)
    assert code == 0, said
    assert (out / "tokenizer.json").read_text() == '{"version": "1.0"}'


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GG")
    code, said = run(file, "-o", tmp_path / "out", "--format", "int4")
    assert code == 1
    assert str(file) in said
    assert len(said.strip().splitlines()) == 1
