"""The one line that an error in a worker ends the server with."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lvllm import formats
from lvllm.checkpoint.headers import Checkpoint
from lvllm.faults import process
from lvllm.loading import model_loader
from lvllm.loading.reader import Reader
from lvllm.moe.arrivals import LayerError

CHILD = """
import sys
from lvllm.faults import process
process.end(sys.argv[1])
"""


@pytest.fixture
def front(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process as the front one of a server."""
    monkeypatch.delenv(process._VARIABLE, raising=False)
    process.prepare()
    monkeypatch.setenv(process._VARIABLE, os.environ[process._VARIABLE])


def worker(line: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CHILD, line],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(__file__).parents[2],
    )


def waiting(error: Exception | None) -> object:
    """What waiting for processes gives, if upstream's own waiting raises this."""

    class Owner:
        @staticmethod
        def wait() -> str:
            if error is not None:
                raise error
            return "ready"

    process._wrap(Owner, "wait", staticmethod)
    process._wrap(Owner, "wait", staticmethod)  # plugins are loaded more than once
    return Owner.wait()


@pytest.mark.usefixtures("front")
def test_the_front_process_ends_in_the_first_workers_line() -> None:
    for line in ("tensor 'a':\n  is damaged", "tensor 'b' is damaged"):
        done = worker(line)
        assert (done.returncode, done.stdout) == (1, "")
    with pytest.raises(SystemExit, match=r"^lvllm: tensor 'a': is damaged$"):
        waiting(RuntimeError("Engine core initialization failed"))
    assert waiting(None) == "ready"


@pytest.mark.usefixtures("front")
def test_other_failures_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="initialization failed"):
        waiting(RuntimeError("Engine core initialization failed"))


@pytest.mark.usefixtures("front")
def test_a_worker_follows_one_that_has_said_why() -> None:
    process.follow()
    worker("tensor 'a' is damaged")
    with pytest.raises(SystemExit) as caught:
        process.follow()
    assert caught.value.code == 1


@pytest.mark.usefixtures("front")
def test_an_error_in_the_front_process_itself() -> None:
    with pytest.raises(SystemExit, match=r"^lvllm: no$"):
        process.end("no")


@pytest.mark.parametrize("value", [None, "1:99"])
def test_a_worker_without_a_way_to_the_front_says_it_itself(
    value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(process._VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(process._VARIABLE, value)
    done = worker("tensor 'a' is damaged")
    assert (done.returncode, done.stdout) == (1, "lvllm: tensor 'a' is damaged\n")


def test_lvllms_own_errors_are_their_message() -> None:
    class Unknown:
        def get_name(self) -> str:
            return "unknown"

    with pytest.raises(ValueError) as caught:
        formats.find(Unknown(), None, "model.layers.0")
    said = model_loader.describe(caught.value)
    assert said is not None
    assert said.startswith("model.layers.0: experts quantised as 'unknown' are not supported")


def test_other_errors_are_no_business_of_ours() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.zeros(2).view(3)
    assert model_loader.describe(caught.value) is None


def test_an_error_over_a_tensor_names_it(tmp_path: Path) -> None:
    def load(loaded_weight: torch.Tensor) -> None:
        part = loaded_weight[:3]
        torch.zeros(2, 2).copy_(part)

    save_file({"a.weight": torch.rand(4, 5)}, tmp_path / "model.safetensors")
    for tensor in Reader().read(Checkpoint.open(tmp_path).tensors.values()):
        with pytest.raises(RuntimeError) as caught:
            load(tensor)
        said = model_loader.describe(caught.value)
        assert said is not None
        assert said.startswith(
            f"{tmp_path}/model.safetensors: tensor 'a.weight': float32 [4, 5]: does not fit the"
            " model: RuntimeError: The size of tensor"
        )
        assert "\n" not in said


def test_of_several_tensors_the_last_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(loaded_weight: torch.Tensor, earlier: torch.Tensor) -> None:
        raise RuntimeError("no room for it")

    save_file({name: torch.rand(4) for name in ("a", "b")}, tmp_path / "model.safetensors")
    first, last = Reader([0]).read(Checkpoint.open(tmp_path).tensors.values())
    monkeypatch.setattr(model_loader, "_current", last.source.info)
    with pytest.raises(RuntimeError) as caught:
        load(last, first)
    said = model_loader.describe(caught.value)
    assert said is not None
    assert f"tensor {last.source.info.name!r}" in said


def test_an_error_over_a_layer_names_no_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"a": torch.rand(4)}, tmp_path / "model.safetensors")
    monkeypatch.setattr(model_loader, "_current", Checkpoint.open(tmp_path).tensors["a"])
    assert model_loader.describe(LayerError("layer 3: too little")) == "layer 3: too little"
