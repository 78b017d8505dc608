"""The one line about an error while a model is built or loaded, and what vLLM's loaders call."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from lvllm import formats, patches
from lvllm.checkpoint.headers import Checkpoint, CheckpointError
from lvllm.errors import LayerError, LvllmError, TensorError, naming_layer
from lvllm.loading import in_hand, model_loader
from lvllm.loading.file_tensor import FileTensor
from lvllm.loading.reader import Reader
from lvllm.settings.configuration import HybridConfig


@pytest.fixture(autouse=True)
def nothing_in_hand() -> Iterator[None]:
    in_hand.clear()
    yield
    in_hand.clear()


def read(folder: Path, **tensors: torch.Tensor) -> Iterator[FileTensor]:
    """The tensors of a new checkpoint in `folder`."""
    save_file(tensors, folder / "model.safetensors")
    return Reader([0]).read(Checkpoint.open(folder).tensors.values())


def test_lvllms_own_errors_are_their_message() -> None:
    class Unknown:
        def get_name(self) -> str:
            return "unknown"

    with pytest.raises(ValueError) as caught, naming_layer("model.layers.0"):
        formats.find(Unknown(), None, "model.layers.0")
    said = model_loader.describe(caught.value)
    assert said is not None
    assert said.startswith("model.layers.0: experts quantised as 'unknown' are not supported")


def test_other_errors_are_no_business_of_ours() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.zeros(2).view(3)
    assert model_loader.describe(caught.value) is None
    assert model_loader.describe(ValueError("from anywhere")) is None


def test_an_error_over_a_tensor_names_it(tmp_path: Path) -> None:
    def load(loaded_weight: torch.Tensor) -> None:
        part = loaded_weight[:3]
        torch.zeros(2, 2).copy_(part)

    for tensor in read(tmp_path, **{"a.weight": torch.rand(4, 5)}):
        with pytest.raises(RuntimeError) as caught:
            load(tensor)
        said = model_loader.describe(caught.value)
        assert said is not None
        assert said.startswith(
            f"{tmp_path}/model.safetensors: tensor 'a.weight': float32 [4, 5]: does not fit the"
            " model: RuntimeError: The size of tensor"
        )
        assert "\n" not in said


def test_of_several_tensors_the_last_one_is_named(tmp_path: Path) -> None:
    def load(loaded_weight: torch.Tensor, earlier: torch.Tensor) -> None:
        raise RuntimeError("no room for it")

    tensors = read(tmp_path, a=torch.rand(4), b=torch.rand(4))
    first, last = next(tensors), next(tensors)
    with pytest.raises(RuntimeError) as caught:
        load(last, first)
    said = model_loader.describe(caught.value)
    assert said is not None
    assert f"tensor {last.source.info.name!r}" in said


@pytest.mark.parametrize("all_read", [False, True])
def test_of_tensors_that_are_loaded_late_the_one_in_use_is_named(
    all_read: bool, tmp_path: Path
) -> None:
    """A model may collect its tensors, and only then compare a shape and fail."""
    tensors = read(tmp_path, a=torch.rand(4), b=torch.rand(4))
    collected = list(tensors) if all_read else [next(tensors), next(tensors)]
    for tensor in collected:
        part = tensor[:3]
        assert isinstance(part, FileTensor)
        for rows in (lambda t: t.shape[0], lambda t: t.size(0), lambda t: t.size()[0]):
            in_hand.clear()
            with pytest.raises(AssertionError) as caught:
                assert rows(part) == 5
            said = model_loader.describe(caught.value)
            assert said is not None
            assert f"tensor {tensor.source.info.name!r}: float32 [4]: does not fit" in said


def test_after_the_last_tensor_none_is_named(tmp_path: Path) -> None:
    for tensor in read(tmp_path, a=torch.rand(4)):
        torch.empty(4).copy_(tensor)
    assert model_loader.describe(RuntimeError("of something else")) is None


def test_a_tensor_that_a_layer_refuses_is_named(tmp_path: Path) -> None:
    tensor = next(read(tmp_path, a=torch.rand(4)))
    said = model_loader.describe(TensorError("has 4 columns,\nwanted 8"))
    assert said == f"{tensor.source.info.file}: tensor 'a': float32 [4]: has 4 columns, wanted 8"


def test_an_error_over_a_layer_names_no_tensor(tmp_path: Path) -> None:
    next(read(tmp_path, a=torch.rand(4)))
    assert in_hand.tensor() is not None
    assert model_loader.describe(LayerError("layer 3: too little")) == "layer 3: too little"


def test_loading_ends_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> None:
        raise LayerError("layer 3:\ntoo little")

    monkeypatch.delenv("_LVLLM_FAILURE", raising=False)
    with pytest.raises(LvllmError, match=r"^layer 3: too little$"):
        model_loader.end_in_one_line(load)
    with pytest.raises(ZeroDivisionError):
        model_loader.end_in_one_line(lambda: 1 // 0)
    assert model_loader.end_in_one_line(lambda: 7) == 7


@pytest.mark.parametrize("experts", [True, False])
def test_vllms_own_words_about_missing_weights(
    experts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever vLLM says, models with experts end with an error that is printed as one line."""

    def upstream(self: object, model: object, loaded: set[str], quantized: bool = False) -> None:
        raise ValueError("some day vLLM words this differently: {'norm.weight'}")

    monkeypatch.setattr(model_loader, "has_experts", lambda: experts)
    track = patches.loading.check_names.make(upstream)
    model = torch.nn.Module()
    model.norm = torch.nn.LayerNorm(4, bias=False)
    with pytest.raises(ValueError) as caught:
        track(None, model, set())
    said = model_loader.describe(caught.value)
    assert said == ("norm.weight is not in the checkpoint" if experts else None)
    with pytest.raises(ValueError) as caught:
        track(None, model, {"norm.weight"})
    assert isinstance(caught.value, CheckpointError) == experts


def test_pickles_are_refused_unless_they_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def config(load_format: str, experts: int) -> None:
        found = SimpleNamespace(
            load_config=SimpleNamespace(load_format=load_format),
            model_config=SimpleNamespace(get_num_experts=lambda: experts),
        )
        monkeypatch.setattr(model_loader, "get_current_vllm_config", lambda: found)
        monkeypatch.setattr(HybridConfig, "current_or_none", lambda: object())

    iterate = patches.loading.refuse_pickles.make(lambda files, *args: "read")
    for load_format in ("auto", "hf"):
        config(load_format, 4)
        with pytest.raises(CheckpointError, match=r"^a\.bin: is a pickle"):
            iterate(["a.bin"], True)
    for load_format, experts in (("pt", 4), ("auto", 0)):
        config(load_format, experts)
        assert iterate(["a.bin"], True) == "read"
