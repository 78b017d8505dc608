"""What the front process makes of arguments before vLLM makes a configuration of them."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gguf import GGMLQuantizationType as Type
from vllm.config import CompilationMode
from vllm.platforms import current_platform

from lvllm.checkpoint.gguf.folder import is_presented
from lvllm.errors import LvllmError
from lvllm.prepare import check_compilation, check_operators, take_gguf
from tests.models.gguf import write

TINY = Path(__file__).parents[1] / "examples/models/tiny-moe"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(TINY, tmp_path_factory.mktemp("file") / "tiny.gguf", lambda name: Type.F32)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def taken(model: Path, **given: Any) -> SimpleNamespace:
    """Arguments of vLLM, after LvLLM has seen them."""
    arguments = SimpleNamespace(
        model=str(model),
        load_format="auto",
        quantization=None,
        hf_config_path=None,
        tokenizer=None,
        skip_tokenizer_init=False,
        served_model_name=None,
    )
    vars(arguments).update(given)
    take_gguf(arguments)
    return arguments


def test_a_file_becomes_a_folder_under_its_own_name(file: Path) -> None:
    found = taken(file)
    assert is_presented(Path(found.model))
    assert (Path(found.model) / "tokenizer.json").is_file()
    assert found.load_format == "gguf"
    assert found.served_model_name == str(file)
    # Another process builds the configuration once more, from the folder.
    again = SimpleNamespace(**vars(found))
    take_gguf(again)
    assert again == found
    assert taken(file, served_model_name="tiny").served_model_name == "tiny"


def test_other_models_are_left_alone() -> None:
    for model in (TINY, Path("owner/model")):
        found = taken(model)
        assert (found.model, found.load_format) == (str(model), "auto")
        assert found.served_model_name is None


def test_a_tokenizer_and_a_configuration_of_the_users_own(file: Path, tmp_path: Path) -> None:
    config = json.loads((TINY / "config.json").read_text()) | {"rope_theta": 7.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = taken(file, hf_config_path=str(tmp_path), tokenizer=str(TINY))
    folder = Path(found.model)
    assert found.hf_config_path is None
    assert not (folder / "tokenizer.json").exists()
    written = json.loads((folder / "config.json").read_text())
    assert written["rope_theta"] == 7.0
    assert written["quantization_config"]["quant_method"] == "gguf"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"load_format": "safetensors"}, "load-format='safetensors' is not allowed with the GGUF"),
        ({"quantization": "fp8"}, "quantization='fp8' is not allowed with the GGUF file "),
        ({"hf_config_path": "/no/folder"}, "hf-config-path='/no/folder': has no config.json"),
    ],
)
def test_what_is_refused(given: dict[str, Any], said: str, file: Path) -> None:
    with pytest.raises(LvllmError) as error:
        taken(file, **given)
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)


MODES = CompilationMode


@pytest.mark.parametrize(
    ("cpu", "compiler", "given", "left"),
    [
        (True, "no-such-g++", None, MODES.NONE),
        (True, "no-such-g++", MODES.NONE, MODES.NONE),
        (True, "true", None, None),
        (True, "true", MODES.VLLM_COMPILE, MODES.VLLM_COMPILE),
        (False, "no-such-g++", None, None),
    ],
)
def test_nothing_is_compiled_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch, cpu: bool, compiler: str, given: Any, left: Any
) -> None:
    monkeypatch.setattr(current_platform, "is_cpu", lambda: cpu)
    monkeypatch.setenv("CXX", compiler)
    arguments = SimpleNamespace(compilation_config=SimpleNamespace(mode=given))
    check_compilation(arguments)
    assert arguments.compilation_config.mode == left


def test_a_compiled_mode_is_refused_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(current_platform, "is_cpu", lambda: True)
    monkeypatch.setenv("CXX", "no-such-g++")
    arguments = SimpleNamespace(compilation_config=SimpleNamespace(mode=MODES.VLLM_COMPILE))
    with pytest.raises(LvllmError, match="mode=VLLM_COMPILE: only NONE is possible here: there is"):
        check_compilation(arguments)


def test_vllms_operators_are_there() -> None:
    check_operators()
    with pytest.raises(LvllmError, match="they need libnuma"):
        check_operators("no_such_operator")
