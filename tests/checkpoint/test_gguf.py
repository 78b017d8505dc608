"""Models in GGUF files: their configuration, names and values, and damaged files."""

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file

from lvllm.checkpoint.gguf.finding import gguf_of
from lvllm.checkpoint.gguf.folder import configuration, is_presented, present
from lvllm.checkpoint.gguf.tensors import checkpoint_of
from lvllm.checkpoint.gguf_headers import open_gguf
from lvllm.checkpoint.headers import CheckpointError
from lvllm.checkpoint.opening import open_checkpoint
from lvllm.errors import LvllmError
from lvllm.formats.gguf import check_types
from lvllm.loading.reader import Reader
from tests.models.gguf import dequantised, write
from tests.models.make import make

TINY = Path(__file__).parents[2] / "examples/models/tiny-moe"
SIZES = {"moe_intermediate_size": 64, "mlp_only_layers": [], "num_hidden_layers": 2}


def q8_0(name: str) -> Type:
    """The type of each tensor of a file that is all Q8_0 where that can be."""
    return Type.F32 if "norm" in name or "ffn_gate_inp" in name else Type.Q8_0


def mixed(name: str) -> Type:
    """Another type for each kind of tensor, with experts that are plain numbers."""
    kinds = {"attn_q": Type.Q5_1, "attn_k": Type.Q4_0, "attn_v": Type.Q4_1, "token": Type.Q5_0}
    if "norm" in name:
        return Type.F32
    return next((kind for part, kind in kinds.items() if part in name), Type.BF16)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("qwen3_moe", tmp_path_factory.mktemp("plain") / "model", 7, **SIZES)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(TINY, tmp_path_factory.mktemp("tiny") / "tiny.gguf", q8_0)


def refusal(call: Callable[[], Any], path: Path) -> str:
    """The one line in which `call` ends, without the name of the file."""
    with pytest.raises(CheckpointError) as error:
        call()
    said = str(error.value)
    assert "\n" not in said
    assert said.startswith(f"{path}: ")
    return said.removeprefix(f"{path}: ")


def test_the_configuration_is_that_of_the_model(plain: Path, tmp_path: Path) -> None:
    file = write(plain, tmp_path / "model.gguf", q8_0)
    folder = present(file, tokenizer=False)
    assert folder == present(file, tokenizer=False)
    found = transformers.AutoConfig.from_pretrained(folder).to_dict()
    wanted = transformers.AutoConfig.from_pretrained(plain).to_dict()
    assert found.pop("quantization_config") == {
        "quant_method": "gguf",
        "experts": {"0": ["Q8_0"] * 3, "1": ["Q8_0"] * 3},
    }
    for names in (found, wanted):
        # Tokens are the tokenizer's, which this model lacks, and these have no meaning here.
        for name in ("_name_or_path", "transformers_version", "use_cache", "bos_token_id"):
            names.pop(name, None)
        for name in ("eos_token_id", "pad_token_id", "initializer_range", "attention_dropout"):
            names.pop(name, None)
    assert found.pop("rms_norm_eps") == pytest.approx(wanted.pop("rms_norm_eps"))
    assert {name: (found.get(name), value) for name, value in wanted.items()} == {
        name: (value, value) for name, value in wanted.items()
    }


@pytest.mark.parametrize("kind", [q8_0, mixed])
@pytest.mark.parametrize("parts", [1, 3])
def test_every_tensor_has_its_name_and_values(
    kind: Callable[[str], Type], parts: int, plain: Path, tmp_path: Path
) -> None:
    file = write(plain, tmp_path / "model.gguf", kind, parts)
    values = load_file(dequantised(plain, tmp_path / "values", kind) / "model.safetensors")
    found = open_checkpoint(present(file, tokenizer=False)).tensors
    assert found.keys() == values.keys()
    for tensor in Reader([0]).read(found.values()):
        info = tensor.source.info
        assert info.file.parent == tmp_path  # and not the folder with a link to it
        read = torch.empty(tensor.shape, dtype=tensor.dtype)
        read.copy_(tensor)
        if read.dtype == torch.uint8:  # experts in blocks are as in the file
            read = torch.from_numpy(gguf.dequantize(read.numpy(), Type.Q8_0))
        assert torch.equal(read.float(), values[info.name]), info.name


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"expert_count": None}, "has no field 'qwen3moe.expert_count'"),
        (
            {"expert_count": 9},
            "tensor 'blk.0.ffn_down_exps.weight': has the shape [8, 128, 64]",
        ),
        ({"expert_count": 1 << 17}, "field 'qwen3moe.expert_count' is 131072: a whole number fr"),
        ({"expert_used_count": 9}, "field 'qwen3moe.expert_used_count' is 9: a whole number from"),
        ({"block_count": 0}, "field 'qwen3moe.block_count' is 0: a whole number from 1 to 512"),
        ({"block_count": 1}, "tensor 'blk.1."),
        ({"block_count": 3}, "has no tensor 'blk.2.ffn_gate_exps.weight'"),
        ({"rope.freq_base": 0.0}, "field 'qwen3moe.rope.freq_base' is 0.0: a number greater than"),
        ({"rope.freq_base": "x"}, "field 'qwen3moe.rope.freq_base' is 'x': a number is wanted"),
        ({"nextn_predict_layers": 2}, "field 'qwen3moe.nextn_predict_layers' is 2: a whole number"),
        ({"leading_dense_block_count": 3}, "field 'qwen3moe.leading_dense_block_count' is 3: a"),
        ({"rope.scaling.type": "longrope"}, "field 'qwen3moe.rope.scaling.type' is 'longrope': n"),
        ({"attention.value_length": 8}, "field 'qwen3moe.attention.value_length' is 8: 32 is wan"),
    ],
)
def test_fields_that_mean_nothing(
    fields: dict[str, Any], said: str, plain: Path, tmp_path: Path
) -> None:
    file = write(plain, tmp_path / "model.gguf", q8_0, **fields)
    assert refusal(lambda: present(file, tokenizer=False), file).startswith(said)


def test_another_architecture(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    file = gguf.GGUFWriter(path, "mamba")
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_ti_data_to_file()
    file.close()
    said = refusal(lambda: present(path, tokenizer=False), path)
    assert said.startswith("GGUF files of the architecture 'mamba' are not served; served are qwen")


def test_tensors_that_nobody_knows(plain: Path, tmp_path: Path) -> None:
    more = tmp_path / "more"
    tensors = load_file(plain / "model.safetensors")
    more.mkdir()
    (more / "config.json").write_text((plain / "config.json").read_text())
    layer = "model.layers.0."
    save_file(
        {**tensors, f"{layer}self_attn.q_proj.bias": torch.ones(128)}, more / "model.safetensors"
    )
    file = write(more, tmp_path / "bias.gguf", lambda name: Type.F32)
    checkpoint_of(file)  # a bias that vLLM will refuse, since the model has none
    content = file.read_bytes().replace(b"blk.0.attn_q.bias", b"blk.0.attn_x.bias")
    file.write_bytes(content)
    said = refusal(lambda: checkpoint_of(file), file)
    assert said == "tensor 'blk.0.attn_x.bias': a model of qwen3moe with 2 layers has none"


def test_experts_of_types_that_lk_does_not_compute(plain: Path, tmp_path: Path) -> None:
    def odd(name: str) -> Type:
        return Type.F16 if name == "blk.0.ffn_up_exps.weight" else q8_0(name)

    file = write(plain, tmp_path / "odd.gguf", odd)
    config = configuration(open_gguf(file))
    check_types(config, str(file))
    found = refusal(lambda: check_types(config | {"model_type": "gpt_oss"}, str(file)), file)
    assert found.startswith("tensor 'blk.0.ffn_up_exps.weight': is F16, and ffn_gate_exps is Q8_0")
    config["quantization_config"]["experts"]["1"] = ["Q8_0", "TQ1_0", "Q8_0"]
    found = refusal(lambda: check_types(config, str(file)), file)
    assert found.startswith("tensor 'blk.1.ffn_up_exps.weight': experts of the type TQ1_0 are not")


def test_data_that_are_not_there(plain: Path, tmp_path: Path) -> None:
    """A file that is cut anywhere ends in one line."""
    file = write(plain, tmp_path / "model.gguf", q8_0)
    whole = file.read_bytes()
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    draw = random.Random(seed)
    for size in [draw.randrange(len(whole)) for _ in range(60)] + [len(whole) - 33]:
        file.write_bytes(whole[:size])
        assert "truncated" in refusal(lambda: present(file, tokenizer=False), file) or size == 0


def test_places_that_cannot_be(plain: Path, tmp_path: Path) -> None:
    file = write(plain, tmp_path / "model.gguf", q8_0)
    whole = bytearray(file.read_bytes())
    name = b"blk.0.attn_q.weight"
    at = whole.index(name) + len(name) + 4 + 2 * 8 + 4
    for place, said in ((1 << 62, "truncated: ends at byte"), (0, "overlaps tensor")):
        whole[at : at + 8] = struct.pack("<Q", place)
        file.write_bytes(whole)
        assert said in refusal(lambda: present(file, tokenizer=False), file)


def test_changed_bytes_end_in_one_line_or_a_folder(tiny: Path, tmp_path: Path) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    draw = random.Random(seed)
    whole = tiny.read_bytes()
    header = min(tensor.start for tensor in open_gguf(tiny).tensors.values())
    file = tmp_path / "x.gguf"
    refused = 0
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(draw.randrange(1, 4)):
            content[draw.randrange(header)] = draw.randrange(256)
        file.write_bytes(content)
        said = ""
        try:
            present(file, tokenizer=True)
        except LvllmError as error:
            said = str(error)
        assert "\n" not in said
        refused += bool(said)
    assert refused


def test_which_file_is_meant(plain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    assert gguf_of(str(folder)) is None
    assert gguf_of("owner/model") is None
    assert gguf_of(str(plain)) is None
    first = write(plain, folder / "model.gguf", q8_0, parts=2)
    assert first.name == "model-00001-of-00002.gguf"
    (folder / "mmproj-model.gguf").write_bytes(b"GGUF")
    (folder / "config.json").write_text("{}")
    assert gguf_of(str(folder)) == first
    assert gguf_of(str(first)) == first
    presented = present(first, tokenizer=False)
    assert is_presented(presented)
    assert gguf_of(str(presented)) == presented / first.name
    (folder / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"the folder has 2 models; name one: model-00001-of"):
        gguf_of(str(folder))
    with pytest.raises(CheckpointError, match=r"x\.gguf: no such file"):
        gguf_of(str(tmp_path / "x.gguf"))
    (folder / "model-00002-of-00002.gguf").unlink()
    with pytest.raises(
        CheckpointError, match=r"is not there; 1 of the model's 2 files are missing"
    ):
        present(first, tokenizer=False)


def test_a_changed_file_gets_another_folder(plain: Path, tmp_path: Path) -> None:
    file = write(plain, tmp_path / "model.gguf", q8_0)
    before = present(file, tokenizer=False)
    given = json.loads((before / "config.json").read_text()) | {"rope_theta": 5.0}
    with_config = present(file, tokenizer=False, config=given)
    assert json.loads((with_config / "config.json").read_text())["rope_theta"] == 5.0
    write(plain, file, q8_0, context_length=99)
    after = present(file, tokenizer=False)
    assert len({before, with_config, after}) == 3
    assert json.loads((after / "config.json").read_text())["max_position_embeddings"] == 99
