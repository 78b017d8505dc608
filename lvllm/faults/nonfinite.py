"""Find the requests of a step whose experts met NaN or infinity, and the layer where it happened.

The engine writes the first faulty layer of each row of a batch into a log (`engine.watch`). The
ranks of one host share the memory of their logs: a fault of one rank reaches the others only as
wrong numbers, and the rank that answers the request must know of the fault before it answers.
"""

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lvllm import engine

# The engine's FaultSource, in its order.
INPUT, ROUTER, EXPERT, SUM = range(4)


@dataclass(frozen=True)
class Layer:
    """The properties of a layer that a message about it needs."""

    name: str
    dtype: str
    experts: tuple[int, ...] | None
    """The numbers, in the model, of the experts that the rank holds; None: it holds all experts."""

    def describe(self, source: int, expert: int) -> str:
        number = expert if self.experts is None or expert < 0 else self.experts[expert]
        what = {
            INPUT: "NaN or infinity came in with the input: the fault lies before the experts",
            ROUTER: f"the router's weight for expert {number} is NaN or infinite",
            EXPERT: f"expert {number} makes NaN or infinity of finite numbers",
            SUM: f"the sum of the experts is too large for {self.dtype}",
        }[source]
        return f"{self.name}: {what}"


def layers_of(model: torch.nn.Module, dtype: torch.dtype) -> dict[int, Layer]:
    """The layers of a loaded model that run on the engine, by their handles in the engine."""
    found = {}
    for layer in modules_of(model):
        experts = None
        if layer.expert_map is not None:
            held = (layer.expert_map >= 0).nonzero().flatten()
            experts = tuple(held[layer.expert_map[held].argsort()].tolist())
        name = str(dtype).removeprefix("torch.")
        found[int(layer.engine.handle)] = Layer(layer.layer_name, name, experts)
    return found


def modules_of(model: torch.nn.Module) -> Iterator[Any]:
    """vLLM's modules of a loaded model whose `engine` is an `ExpertLayer`."""
    for module in model.modules():
        if isinstance(getattr(module, "engine", None), engine.ExpertLayer):
            yield module


class Watch:
    """One rank's log, and a view of the logs of all ranks.

    Args:
        layers: the layers of each rank.
        rank: this rank.
        logs: int64 [ranks, steps, rows + 2, 3], zero at first. `steps` is one more than the number
            of steps that may be under way at a time, since a rank clears its log of a step while
            others still read the log of the step before.
        seen: how many ranks, from the first on, have completed a step when this rank completes it;
            None: all. In a pipeline the ranks of later stages have not, so their logs still show an
            older step.
    """

    def __init__(
        self,
        layers: Sequence[dict[int, Layer]],
        rank: int,
        logs: torch.Tensor,
        seen: int | None = None,
    ) -> None:
        self._layers, self._logs, self._step = layers, logs[:seen], 0
        # These views are made once, since making them would be most of the cost of a step.
        self._mine = list(logs[rank])
        # For each step: a view of the numbers of faulty rows that the seen ranks counted.
        self._counts = list(self._logs.numpy()[:, :, 0, 0].T)
        self._rank = rank

    def start(self) -> None:
        """Begin a step. From now on the engine's output is watched."""
        self._step = (self._step + 1) % self._logs.shape[1]
        if self._counts[self._step][self._rank]:
            self._mine[self._step].zero_()
        engine.watch(self._mine[self._step])

    def stop(self) -> bool:
        """End a step, and return whether any rank noted a fault.

        The output of drafts, which are computed after this, is not watched: the model itself checks
        the drafted tokens in a later step.
        """
        engine.watch(None)
        return bool(self._counts[self._step].any())

    def faults(self, spans: Iterable[tuple[str, int]]) -> dict[str, str]:
        """The requests of this step that met a fault, each with one line that describes it.

        `spans` has the requests and the number of rows of each, in the order of the batch. Rows
        after the last request are padded rows.
        """
        logs = self._logs[:, self._step]
        found = {}
        first = 0
        for request, rows in spans:
            entries = logs[:, 1 + first : 1 + first + rows]
            if entries[..., 0].any():
                found[request] = self._first(entries)
            first += rows
        return found

    def any_fault(self) -> str:
        """One line that describes a fault of this step."""
        return self._first(self._logs[:, self._step, 1:])

    def _first(self, entries: torch.Tensor) -> str:
        """One line that describes the first of several faults.

        Faults that arose in a layer come before faults in a layer's input, because ranks without a
        part in the faulty layer see only its effect on the next layer's input.
        """
        found = entries[..., 0].nonzero().tolist()
        faults = [(rank, *entries[rank, row].tolist()) for rank, row in found]
        rank, handle, source, expert = min(faults, key=lambda f: (f[2] == INPUT, f[1]))
        layer = self._layers[rank].get(handle)
        return layer.describe(source, expert) if layer else f"layer {handle} of rank {rank}"


def shared_zeros(shape: Sequence[int], path: str) -> torch.Tensor:
    """An int64 tensor in the memory of a file, which all processes that open the file share."""
    size = torch.Size(shape).numel()
    return torch.from_file(path, shared=True, size=size, dtype=torch.int64).view(tuple(shape))


def open_watch(
    layers: dict[int, Layer], rows: int, steps: int, group: Any = None, seen: int | None = None
) -> Watch:
    """The watch of a rank that is alone, or that shares logs with the ranks of vLLM's `group`.

    The ranks of a group must be on one host, and must call this together. `rows` is the number of
    rows of the largest batch, and `steps` the number of steps that may be under way at a time.
    `seen` is the argument of `Watch`.
    """
    ranks = 1 if group is None else group.world_size
    shape = (ranks, steps + 1, rows + 2, 3)
    if ranks == 1:
        return Watch([layers], 0, torch.zeros(shape, dtype=torch.int64))
    everyone: list[Any] = [None] * ranks
    torch.distributed.all_gather_object(everyone, layers, group=group.cpu_group)
    path = None
    if group.rank_in_group == 0:
        # The file takes memory only for pages that are written, and nearly all of them never are.
        file, path = tempfile.mkstemp(prefix="lvllm-watch-", dir="/dev/shm")
        os.truncate(file, torch.Size(shape).numel() * torch.int64.itemsize)
        os.close(file)
    path = group.broadcast_object(path, src=0)
    try:
        logs = shared_zeros(shape, path)
        torch.distributed.barrier(group=group.cpu_group)
    finally:
        if group.rank_in_group == 0:
            os.unlink(path)
    return Watch(everyone, group.rank_in_group, logs, seen)
