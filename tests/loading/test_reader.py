"""Tensors read straight from files, compared with what the safetensors library reads."""

import random
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lvllm.checkpoint.headers import Checkpoint, CheckpointError
from lvllm.loading import reader as module
from lvllm.loading.file_tensor import FileTensor
from lvllm.loading.reader import Reader, in_loading_order

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


def draw(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of random bits, NaN among them."""
    size = torch.Size(shape).numel() * dtype.itemsize
    bits = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), dtype=torch.uint8)
    return bits.view(dtype).view(shape)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two plain tensors are equal bit for bit, NaN included."""
    assert type(left) is type(right) is torch.Tensor
    return left.dtype == right.dtype and left.shape == right.shape and bits(left) == bits(right)


def file_tensor(folder: Path, tensor: torch.Tensor) -> FileTensor:
    """A FileTensor of the tensor, which does not lie at the beginning of its file."""
    save_file({"before": torch.zeros(3, dtype=torch.int64), "it": tensor}, folder / "a.safetensors")
    info = Checkpoint.open(folder).tensors["it"]
    return next(iter(Reader([0]).read([info])))


def test_every_dtype_and_awkward_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # With these sizes even small tensors are cut into pieces, for more threads than CPUs.
    monkeypatch.setattr(module, "PIECE", 4096)
    monkeypatch.setattr(module, "AHEAD", 1 << 14)
    shapes = [(), (1,), (0,), (3, 0, 2), (7, 5), (4097, 3), (2, 3, 5, 7), (70_001,)]
    for number, dtype in enumerate(DTYPES):
        tensors = {f"t{i}.{dtype}": draw(dtype, shape) for i, shape in enumerate(shapes)}
        save_file(tensors, tmp_path / f"{number}.safetensors")
    expected = {
        name: tensor for file in tmp_path.iterdir() for name, tensor in load_file(file).items()
    }
    checkpoint = Checkpoint.open(tmp_path)
    reader = Reader()
    reader.threads = 5
    seen = set()
    for tensor in reader.read(checkpoint.tensors.values()):
        name = tensor.source.info.name
        seen.add(name)
        want = expected[name]
        assert (tensor.dtype, tensor.shape, tensor.device) == (want.dtype, want.shape, want.device)
        into = torch.empty_like(want)
        into.copy_(tensor)
        assert same(into, want)
        assert same(tensor.in_memory(), want)
    assert seen == set(expected)
    assert reader.bytes_read == 2 * checkpoint.nbytes


WAYS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "rows": lambda t: t.narrow(0, 3, 4),
    "columns": lambda t: t[:, 2:7],
    "every other": lambda t: t[1::2, ::3],
    "one row": lambda t: t[5],
    "one element": lambda t: t[5, 3],
    "transposed": lambda t: t.t(),
    "transposed rows": lambda t: t.t()[2:4].contiguous(),
    "half": lambda t: t.chunk(2, dim=1)[1],
    "expert by expert": lambda t: torch.stack(t.view(3, 4, 10).transpose(1, 2).unbind()),
    "of another shape": lambda t: t.t().reshape(2, -1),
    "other bytes": lambda t: t[2:5].view(torch.int16),
    "wider bytes": lambda t: t[2:5].view(torch.int64),
    "converted": lambda t: t[4:].double(),
    "chosen": lambda t: t[torch.tensor([7, 1])],
    "computed with": lambda t: -t + 2 * t[0],
    "written to": lambda t: t.clone() if t.mul_(3) is None else t[1:].view(-1)[3:],
    "a view written to": lambda t: (t[2:4].zero_(), t)[1] * 1,
    "detached": lambda t: t.data.detach().clone(),
    "of a list": lambda t: torch.tensor(t.tolist()),
    "of numpy": lambda t: torch.from_numpy(t[1:].numpy()),
    "expanded": lambda t: t[:, None].expand(12, 3, 10),
    "nothing of it": lambda t: t[3:3],
}


@pytest.mark.parametrize("way", WAYS)
def test_what_loaders_do_with_tensors(way: str, tmp_path: Path) -> None:
    """Each way of viewing a tensor, copied to a parameter of the same dtype and of another."""
    plain = torch.rand(12, 10)
    wanted = WAYS[way](plain.clone())
    another = torch.float64 if wanted.is_floating_point() else torch.int16
    for dtype in (wanted.dtype, another):
        got = WAYS[way](file_tensor(tmp_path, plain))
        into = torch.empty(wanted.shape, dtype=dtype)
        into.copy_(got)
        assert same(into, wanted.to(dtype))
        # Here the elements are not contiguous, as in the rows of a padded parameter.
        apart = torch.empty(*wanted.shape, 2, dtype=dtype)[..., 0]
        apart.copy_(got)
        assert torch.equal(apart, wanted.to(dtype))


def test_only_what_is_copied_is_read(tmp_path: Path) -> None:
    plain = torch.rand(100, 10)
    save_file({"it": plain}, tmp_path / "a.safetensors")
    reader = Reader([0])
    (tensor,) = reader.read(Checkpoint.open(tmp_path).tensors.values())
    shares = [tensor.narrow(0, 0, 50), tensor.narrow(0, 50, 50).view(torch.int32)]
    assert reader.bytes_read == 0
    into = torch.empty(50, 10)
    into.copy_(shares[0])
    assert reader.bytes_read == into.nbytes
    assert same(into, plain[:50])


def test_a_tensor_outlives_its_reader(tmp_path: Path) -> None:
    tensor = file_tensor(tmp_path, torch.arange(300_000))
    (tmp_path / "a.safetensors").unlink()
    assert torch.stack([tensor, tensor]).sum() == 300_000 * 299_999


def test_a_file_that_shrinks_is_named(tmp_path: Path) -> None:
    tensor = file_tensor(tmp_path, torch.arange(1000))
    file = tmp_path / "a.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"a\.safetensors: tensor 'it': the file was trunc"):
        torch.empty(1000, dtype=torch.int64).copy_(tensor)


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    save_file({"it": torch.rand(3)}, tmp_path / "a.safetensors")
    tensors = Checkpoint.open(tmp_path).tensors.values()
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"a\.safetensors: tensor 'it': No such file"):
        next(iter(Reader([0]).read(tensors)))


SCALES: dict[str, tuple[str, torch.Tensor, float, bool]] = {
    "float32": ("a.weight_scale_inv", torch.rand(9, 3), torch.inf, True),
    "bfloat16": ("a.scales", torch.rand(9, 3).bfloat16(), -torch.inf, True),
    "float16": ("a.gate_up_proj_scale", torch.rand(9, 3).half(), torch.nan, True),
    "e4m3": ("a.weight_scale", torch.rand(9, 3).to(torch.float8_e4m3fn), torch.nan, True),
    "e8m0": ("a.weight_scale", torch.arange(27, dtype=torch.uint8).view(9, 3), 255, True),
    "global": ("a.weight_global_scale", torch.rand(9, 3), torch.nan, True),
    "of inputs": ("a.input_scale", torch.rand(9, 3), torch.inf, False),
    "of inputs, global": ("a.input_global_scale", torch.rand(9, 3), torch.nan, False),
    "no scale": ("a.scale.weight", torch.rand(9, 3), torch.inf, False),
}


COPIES: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda t: torch.empty(t.shape, dtype=t.dtype).copy_(t),
    lambda t: t.double(),
    lambda t: t[6:].clone(),
]


@pytest.mark.parametrize("kind", SCALES)
def test_scales_that_are_no_numbers_are_named(kind: str, tmp_path: Path) -> None:
    name, scale, bad, refused = SCALES[kind]
    for damaged in (False, True):
        if damaged:
            scale[7, 1] = bad
        save_file({name: scale}, tmp_path / "a.safetensors")
        (tensor,) = Reader([0]).read(Checkpoint.open(tmp_path).tensors.values())
        for copy in COPIES:
            if damaged and refused:
                fault = f"a.safetensors: tensor '{name}': 1 of its scales are NaN or infinite"
                with pytest.raises(CheckpointError, match=fault):
                    copy(tensor)
            else:
                copy(tensor)
        if damaged:
            torch.empty(3, 3, dtype=scale.dtype).copy_(
                tensor[:3]
            )  # another rank's scales are sound


def test_a_divisor_of_zero_is_refused(tmp_path: Path) -> None:
    name = "a.weight_global_scale"
    save_file({name: torch.zeros(1)}, tmp_path / "a.safetensors")
    (tensor,) = Reader([0]).read(Checkpoint.open(tmp_path).tensors.values())
    with pytest.raises(CheckpointError, match=f"tensor '{name}': is 0, and weights are divided"):
        torch.empty(1).copy_(tensor)


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        (torch.float32, torch.int32),
        (torch.bfloat16, torch.uint8),
        (torch.float8_e8m0fnu, torch.int8),
        (torch.int32, torch.bfloat16),
        (torch.uint8, torch.float8_e4m3fn),
        (torch.bool, torch.float16),
    ],
)
def test_numbers_of_another_kind_are_refused(
    stored: torch.dtype, wanted: torch.dtype, tmp_path: Path
) -> None:
    tensor = file_tensor(tmp_path, torch.ones(6, 4).to(stored))
    names = [str(dtype).removeprefix("torch.") for dtype in (stored, wanted)]
    for part in (tensor, tensor[2:4, 1:3]):
        fault = f"'it': is {names[0]}, the model takes {names[1]}"
        with pytest.raises(CheckpointError, match=fault):
            torch.empty(part.shape, dtype=wanted).copy_(part)


@pytest.mark.parametrize("shape", [(), (1,), (1, 4), (6, 1), (6, 1, 1)])
def test_fewer_numbers_than_the_model_takes_are_refused(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    """PyTorch would repeat them without a word."""
    tensor = file_tensor(tmp_path, torch.rand(shape))
    wanted = torch.empty((6, 6, 4) if len(shape) == 3 else (6, 4))
    fault = re.escape(f"'it': is {list(shape)}, the model takes {list(wanted.shape)}")
    with pytest.raises(CheckpointError, match=fault):
        wanted.copy_(tensor)


def test_one_number_may_have_any_number_of_dimensions(tmp_path: Path) -> None:
    tensor = file_tensor(tmp_path, torch.tensor(2.5))
    for shape in ((), (1,), (1, 1)):
        assert torch.empty(shape).copy_(tensor).flatten().tolist() == [2.5]


def test_exponents_are_bytes_or_numbers(tmp_path: Path) -> None:
    exponents = torch.randint(1, 255, (8, 6), dtype=torch.uint8)
    tensor = file_tensor(tmp_path, exponents.view(torch.float8_e8m0fnu))
    for part, wanted in ((tensor, exponents), (tensor[:, 2:5], exponents[:, 2:5])):
        kept = torch.empty(wanted.shape, dtype=torch.uint8)
        kept.copy_(part)
        assert torch.equal(kept, wanted)
        meant = torch.empty(wanted.shape)
        meant.copy_(part)
        assert torch.equal(meant, (wanted.float() - 127).exp2())


NAMES = [
    *(f"model.layers.{n}.mlp.experts.{e}.up_proj.weight" for n in range(12) for e in range(3)),
    *(f"model.layers.{n}.norm.weight" for n in range(12)),
    *(f"mtp.layers.0.{name}" for name in ("norm.weight", "fc.weight")),
    "lm_head.weight",
    "model.embed_tokens.weight",
    "model.norm.weight",
    *(f"model.visual.blocks.{n}.weight" for n in range(11)),
    "mtp.norm.weight",
]


def test_the_order_is_layer_by_layer_over_all_files(tmp_path: Path) -> None:
    rng = random.Random(7)
    names = rng.sample(NAMES, len(NAMES))
    for number in range(4):
        shard = {name: torch.rand(rng.randrange(5)) for name in names[number::4]}
        save_file(shard, tmp_path / f"{number}.safetensors")
    ordered = in_loading_order(Checkpoint.open(tmp_path).tensors.values())
    assert sorted(info.name for info in ordered) == sorted(NAMES)

    layers = [int(info.name.split(".")[2]) for info in ordered if "model.layers" in info.name]
    assert layers == sorted(layers)
    for depth in (1, 2):  # names with a common beginning are neighbours
        heads = [".".join(info.name.split(".")[:depth]) for info in ordered]
        runs = [head for at, head in enumerate(heads) if at == 0 or heads[at - 1] != head]
        assert len(runs) == len(set(heads))
    for layer in range(12):
        of_layer = [info for info in ordered if f"model.layers.{layer}." in info.name]
        places = [(info.file, info.start) for info in of_layer]
        assert places == sorted(places)


def test_files_are_asked_for_ahead_of_a_consumer_that_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AHEAD", 4000)
    tensors = {f"layers.{n:02}.weight": torch.rand(100) for n in range(100)}
    save_file(tensors, tmp_path / "a.safetensors")
    order = in_loading_order(Checkpoint.open(tmp_path).tensors.values())
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(module.OpenFile, "will_need", lambda _, *run: asked.append(run))

    for _ in Reader([0]).read(order):
        pass
    assert asked == []

    reader = Reader([0])
    for number, tensor in enumerate(reader.read(order)):
        tensor.in_memory()
        reader._adviser.submit(int).result()  # the adviser has done what was submitted before
        if number > 0:
            assert asked[-1][1] >= min(order[number].end + 4000 - 1000, order[-1].end)
            assert asked[-1][1] <= order[number].end + 4000
    assert asked[0][0] == order[1].start
    assert asked[-1][1] == order[-1].end
    assert all(end == start for (_, end), (start, _) in pairwise(asked))
