"""One copy of the experts for several processes, whichever of them ends first."""

import gc
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from random import randrange
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lvllm import engine, sharing
from lvllm.engine import bank
from lvllm.handover import sockets
from lvllm.moe import engine_layer
from tests.random_layers import Random, random_layer
from tests.sharing_owner import LARGE, layers

ROOT = Path(__file__).parents[1]


class Process:
    """A running `tests.sharing_owner`."""

    def __init__(self, name: str, seed: int) -> None:
        self.child = subprocess.Popen(
            [sys.executable, "-m", "tests.sharing_owner", name, str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"},
        )
        self.said()

    def said(self) -> int:
        """Wait for its next line, which says how many bytes it holds."""
        assert self.child.stdout is not None
        return int(self.child.stdout.readline().split()[1])

    def go_on(self) -> None:
        assert self.child.stdin is not None
        self.child.stdin.write("\n")
        self.child.stdin.flush()

    def kill(self) -> None:
        self.child.kill()
        self.child.wait()


@pytest.fixture
def name(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(sharing, "_current", None)
    yield f"lvllm/test/{os.getpid()}/{randrange(1 << 60)}"
    if sharing._current is not None:
        sharing._current.close()


def shared_bytes(process: int | str = "self") -> tuple[int, int]:
    """Bytes of shared memory that a process has mapped, and its share of them."""
    text = Path(f"/proc/{process}/smaps").read_text()
    areas = [area for area in re.split(r"\n(?=[0-9a-f]+-)", text) if "lvllm-experts" in area]

    def total(field: str) -> int:
        return sum(int(kib) for area in areas for kib in re.findall(rf"\n{field}:\s+(\d+)", area))

    return total("Rss") * 1024, total("Pss") * 1024


@pytest.mark.slow
def test_layers_of_another_process(name: str) -> None:
    """Layers have the same bits in every format. There is one copy, and it outlives its owner."""
    seed = randrange(1 << 30)
    print(f"seed {seed}")
    owner = Process(name, seed)
    follower = sharing.join(name)
    assert isinstance(follower, sharing.Follower)
    assert sharing.follower() is follower is sharing.join(name)
    assert sharing.publisher() is None
    assert follower.process == owner.child.pid
    before = bank.allocated_bytes()
    made, held, random = {}, 0, Random(seed)
    for layer in layers(seed):
        owner.go_on()
        held = owner.said()
        made[layer] = engine.ExpertLayer(**follower.receive(layer), ordered=True)
    assert bank.allocated_bytes() == before
    assert held >= 48 << 20

    def check() -> None:
        for layer, plain in layers(seed).items():
            hidden = made[layer].hidden_size
            x = random.normal(7, hidden).bfloat16()
            ids = random.integers(-1, made[layer].num_experts, 7, 2).int()
            weights = random.uniform(0, 1, 7, 2)
            assert torch.equal(made[layer](x, ids, weights), plain.make()(x, ids, weights)), layer

    check()
    # All pages of all layers are mapped here once they are read.
    sums = [tensor.view(torch.uint8).sum() for m in made.values() for tensor in m.tensors.values()]
    assert len(sums) > 2 * len(made)
    (mine, my_share), (_, its_share) = shared_bytes(), shared_bytes(owner.child.pid)
    weights = sum(t.numel() * t.itemsize for m in made.values() for t in m.tensors.values())
    assert weights <= mine <= held
    assert my_share < 0.6 * mine
    assert my_share + its_share <= held
    # No memory has a name that could be left behind.
    assert "/dev/shm" not in Path(f"/proc/{owner.child.pid}/maps").read_text()
    owner.kill()
    check()
    assert shared_bytes()[1] == mine
    made[LARGE].release()  # Nothing is put back, since the memory is read-only.
    made.clear()
    gc.collect()
    assert shared_bytes() == (0, 0)
    assert isinstance(sharing._current, sharing.Follower)
    sharing._current.close()
    assert isinstance(sharing.join(name), sharing.Owner)  # The name was freed with its owner.


@pytest.mark.slow
def test_an_owner_that_is_killed_while_it_loads(name: str) -> None:
    """A process that waits for a layer gets an error in one line, at once."""
    owner = Process(name, 1)
    follower = sharing.join(name)
    assert isinstance(follower, sharing.Follower)
    owner.go_on()
    owner.said()
    follower.receive("bf16")
    threading.Timer(1, owner.kill).start()
    start = time.monotonic()
    with pytest.raises(ValueError, match=rf"^fp16: process {owner.child.pid}, .* ended before"):
        follower.receive("fp16")
    assert time.monotonic() - start < 30  # It does not wait for anything else.
    with pytest.raises(ValueError, match="ended before"):
        follower.receive("fp8")


def test_a_name_goes_with_the_layers_made_under_it(name: str) -> None:
    assert not sharing.is_taken(name)
    owner = sharing.join(f"{name}/0")
    assert sharing.is_taken(name)
    assert sharing.publisher() is owner is sharing.join(f"{name}/0")
    assert sharing.follower() is None
    made = type("Made", (), {})()
    assert isinstance(owner, sharing.Owner)
    owner.publish("a", {"format": "bf16"}, made)
    del made
    gc.collect()
    assert sharing.publisher() is None
    assert not sharing.is_taken(name)
    assert sharing.join(f"{name}/0") is not owner


def test_each_engine_has_its_own_activation_bits() -> None:
    """The owner's, 16 here, are not the follower's: the weights are the same for both."""
    unlimited = dict.fromkeys(("swiglu_alpha", "swiglu_beta", "swiglu_limit"))
    layer = SimpleNamespace(
        layer_name="a",
        moe_config=SimpleNamespace(activation=SimpleNamespace(value="silu"), **unlimited),
        apply_router_weight_on_input=False,
    )
    made = random_layer(Random(randrange(1 << 30)), "int8", 3, 70, 50).make()
    stored: dict[str, Any] = {"format": "int8", "activation_bits": 16, **made.tensors}
    follower: Any = SimpleNamespace(receive=lambda name: dict(stored), close_with=lambda made: None)
    for wanted, bits in ((8, 8), (16, 16), (None, 16)):
        shared = engine_layer.make_of_shared(layer, follower, wanted)
        assert shared.activation_bits == bits


def test_only_engines_of_one_user_share(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = sharing.join(name)
    monkeypatch.setattr(sharing, "_current", None)
    with monkeypatch.context() as patch:
        patch.setattr(sockets, "peer", lambda connection: (123, os.getuid() + 1))
        with pytest.raises(ValueError, match=r"process 123 of user \d+ holds the name"):
            sharing.join(name)
    owner.close()


def configuration(folder: Path, **changes: Any) -> Any:
    parallel = {
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "data_parallel_size": 1,
        "enable_expert_parallel": False,
        "expert_placement_strategy": "linear",
    }
    model = {
        "model": str(folder),
        "revision": None,
        "hf_config": SimpleNamespace(
            to_dict=lambda: {"num_experts": 8, "_name_or_path": str(folder)}
        ),
        "dtype": torch.bfloat16,
        "quantization": None,
    }
    return SimpleNamespace(
        model_config=SimpleNamespace(**{k: changes.get(k, v) for k, v in model.items()}),
        parallel_config=SimpleNamespace(**{k: changes.get(k, v) for k, v in parallel.items()}),
        speculative_config=None,
    )


def test_what_engines_must_have_in_common(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"1")

    def name_of(*of: Any) -> str:
        return sharing.name_of(sharing.identity_of(*of))

    same = name_of(configuration(tmp_path), tmp_path, "KEEP")
    assert name_of(configuration(tmp_path), tmp_path, "KEEP") == same
    linked = tmp_path / "linked"
    linked.symlink_to(tmp_path)
    assert name_of(configuration(linked), linked, "KEEP") == same
    others = [
        name_of(configuration(tmp_path, dtype=torch.float16), tmp_path, "KEEP"),
        name_of(configuration(tmp_path, tensor_parallel_size=2), tmp_path, "KEEP"),
        name_of(configuration(tmp_path, enable_expert_parallel=True), tmp_path, "KEEP"),
        name_of(configuration(tmp_path), tmp_path, "INT4"),
        name_of(configuration(tmp_path), None, "KEEP"),
    ]
    file.write_bytes(b"22")
    others.append(name_of(configuration(tmp_path), tmp_path, "KEEP"))
    assert len({same, *others}) == 7
