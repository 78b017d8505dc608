"""One copy of the experts for several engines of a host: one loads it, the others map its memory.

Engines that would load the same bytes find each other by a name. The name is an abstract Unix
socket, which is no file and is free again when the process that holds it ends. Through the socket
the owner hands out the file descriptors of each layer's memory, once the layer is in the order in
which the engine computes. The memory has no name either. It lives until the last process that maps
it ends, for whatever reason, and so may outlive its owner. Containers with network namespaces of
their own do not find each other.

A bank (`lvllm.bank`) holds such a name without an engine of its own. The engine that loads for it
deposits each layer there and ends, and the bank hands the layers out.
"""

import hashlib
import json
import math
import os
import socket
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import lvllm
from lvllm.engine import bank
from lvllm.errors import LvllmError
from lvllm.handover import banks, sockets
from lvllm.handover.offers import Offers
from lvllm.log import logger
from lvllm.units import ceil_div

__all__ = [
    "Depositor",
    "Follower",
    "Owner",
    "Publisher",
    "allocate_on_meta",
    "follower",
    "identity_of",
    "ignore_weight",
    "is_taken",
    "join",
    "name_of",
    "publisher",
    "same_model",
    "stop",
    "without_memory",
]


ALIGNMENT = 64
"""Small tensors begin at multiples of this many bytes: a cache line, and a vector of the engine."""

FILES = "the set of the model's files"
CONFIG = "config.json (with hf-overrides)"
"""What `identity_of` calls these two."""

Stored = dict[str, Any]
"""Arguments of `ExpertLayer`: tensors, and how their values are stored."""


def identity_of(
    vllm_config: Any, folder: Path | None, use_weight: str, resident: Sequence[int] = ()
) -> dict[str, str]:
    """What engines must have in common for their ranks to load the same experts alike, by names.

    `folder` has the model's files; without it the model's name is taken for them. `resident` are
    the layers whose experts are on an accelerator.
    """
    from vllm import __version__

    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    speculative = vllm_config.speculative_config
    files: list[Any] = [model.model, model.revision]
    if folder is not None:
        names = [*folder.glob("*.safetensors"), *folder.glob("*.gguf")]
        status = [file.stat() for file in sorted(names)]
        files = [(s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns) for s in status]
    config = model.hf_config.to_dict()
    config.pop("_name_or_path", None)  # One folder has many paths.
    same = {
        "vLLM": __version__,
        "LvLLM": lvllm.__version__,
        FILES: _digest(files),
        CONFIG: _digest(config),
        "dtype": model.dtype,
        "quantization": model.quantization,
        "LVLLM_MOE_USE_WEIGHT": use_weight,
        "LVLLM_GPU_RESIDENT_MOE_LAYERS": list(resident),
        "tensor-parallel-size": parallel.tensor_parallel_size,
        "pipeline-parallel-size": parallel.pipeline_parallel_size,
        "data-parallel-size": parallel.data_parallel_size,
        "enable-expert-parallel": parallel.enable_expert_parallel,
        "expert-placement-strategy": parallel.expert_placement_strategy,
        "speculative-config": speculative and (speculative.method, speculative.model),
    }
    return {what: str(value) for what, value in same.items()}


def same_model(identity: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether both have the same files or the same config.json, so that they may differ only in
    settings, or in the copy of the model.
    """
    return any(identity[what] == other.get(what) for what in (FILES, CONFIG))


def name_of(identity: Mapping[str, str]) -> str:
    """The name under which engines with this identity share."""
    return f"lvllm/{os.getuid()}/{_digest(identity)[:32]}"


def _digest(value: Any) -> str:
    """A hash, longer than what `lvllm.handover.banks.differences` shows."""
    return hashlib.sha512(json.dumps(value, default=str, sort_keys=True).encode()).hexdigest()


def is_taken(name: str) -> bool:
    """Whether the first rank of some engine, or a bank, holds this name."""
    return sockets.holder_of(f"{name}/0") is not None


def join(name: str, bank_name: str | None = None) -> "Publisher | Follower":
    """In a worker: take the name, or follow the process that holds it.

    With `bank_name`, this worker loads for the bank that listens there. Further calls with the same
    name return the same object, as long as the layers that were made under that name exist. Raises
    LvllmError if another user's process holds the name.
    """
    global _current
    if _current is not None and _current.name == name and _current.open:
        return _current
    if _current is not None:
        _current.close()
    if bank_name is not None:
        _current = Depositor(name, bank_name)
        return _current
    while True:
        if (listening := sockets.bind(name)) is not None:
            _current = Owner(name, listening)
            return _current
        try:
            connection = sockets.connect(name)
        except OSError:  # The owner has just ended, or does not listen yet.
            time.sleep(0.05)
        else:
            _current = Follower(name, connection)
            return _current


def stop() -> None:
    """In a worker: share nothing, since the next model's experts are for this process alone."""
    global _current
    if _current is not None:
        _current.close()
    _current = None


def publisher() -> "Publisher | None":
    """The owner or depositor that `join` has made in this process, or None."""
    return _current if isinstance(_current, Publisher) and _current.open else None


def follower() -> "Follower | None":
    """The follower that `join` has made in this process, or None."""
    return _current if isinstance(_current, Follower) and _current.open else None


class Publisher(ABC):
    """An engine that loads experts into shared memory."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.open = True
        self._layers = 0

    @abstractmethod
    def _offer(self, layer: str, message: Any, descriptors: list[int]) -> None:
        """Let other engines have a layer, whose memory the descriptors are."""

    def close(self) -> None:
        """Offer nothing more. Processes that have mapped layers keep them."""
        self.open = False

    def in_shared_memory(self, stored: Stored) -> Stored:
        """The same arguments with all tensors in shared memory.

        Tensors that are not there yet are small, and are put into one piece of memory, since each
        piece takes whole pages and a file descriptor. Biases become float32, in which the engine
        adds them.
        """
        tensors = {
            name: value.float() if name.endswith("_bias") else value
            for name, value in stored.items()
            if isinstance(value, torch.Tensor) and not _is_shared(value)
        }
        sizes = [_aligned(tensor.numel() * tensor.itemsize) for tensor in tensors.values()]
        if not tensors:
            return stored
        memory = bank.allocate((1, sum(sizes)), torch.uint8)[0]
        moved = dict(stored)
        for (name, tensor), room in zip(tensors.items(), memory.split(sizes), strict=True):
            used = room[: tensor.numel() * tensor.itemsize]
            moved[name] = used.view(tensor.dtype).view(tensor.shape)
            moved[name].copy_(tensor)
        return moved

    def publish(self, layer: str, stored: Stored, made: Any) -> None:
        """Offer a layer to other engines. This one has `made` it of `stored`, in shared memory."""
        areas: dict[int, tuple[int, int]] = {}  # By descriptor: number and bytes.
        message: dict[str, Any] = {}
        for name, value in stored.items():
            if not isinstance(value, torch.Tensor):
                message[name] = value
                continue
            descriptor, offset, size = bank.shared_place(value)
            number = areas.setdefault(descriptor, (len(areas), size))[0]
            dtype = str(value.dtype).removeprefix("torch.")
            message[name] = {"in": number, "at": offset, "dtype": dtype, "shape": value.shape}
        sizes = [size for _, size in areas.values()]
        if self._layers == 0 and sum(sizes) >= 64 << 20 and not _in_huge_pages():
            logger.warning_once(
                "LvLLM: shared experts lie in pages of 4 KiB here, which costs decoding up to a"
                " fifth: Linux makes them huge from 6.1 on, while it has memory in one piece"
            )
        self._layers += 1
        self._offer(layer, {"areas": sizes, "stored": message}, list(areas))
        # When the layer is freed, the descriptors of its memory are closed.
        weakref.finalize(made, self.close).atexit = False


class Owner(Publisher):
    """The engine that holds the name, until the first of the layers is freed."""

    def __init__(self, name: str, listening: socket.socket) -> None:
        super().__init__(name)
        self._offers = Offers(listening)
        logger.info(
            "LvLLM: experts lie in shared memory; other engines take them from process %d",
            os.getpid(),
        )

    def _offer(self, layer: str, message: Any, descriptors: list[int]) -> None:
        self._offers.add(layer, message, descriptors)

    def close(self) -> None:
        """Give the name up. Processes that have mapped layers keep them."""
        super().close()
        self._offers.close()


class Depositor(Publisher):
    """The engine that loads for a bank, which holds the name.

    Raises LvllmError if the bank has ended.
    """

    def __init__(self, name: str, bank_name: str) -> None:
        super().__init__(name)
        self._bank_name = bank_name

    def _offer(self, layer: str, message: Any, descriptors: list[int]) -> None:
        try:
            deposit = {"deposit": layer, "name": self.name, "message": message}
            banks.tell(self._bank_name, deposit, descriptors)
        except OSError:
            raise LvllmError("the bank for which this process loads has ended") from None


class Follower:
    """An engine that takes its experts from another one."""

    def __init__(self, name: str, connection: socket.socket) -> None:
        self.name = name
        self.open = True
        self._connection = connection
        self.process, user = sockets.peer(connection)
        if not sockets.is_trusted(connection):
            self.close()
            raise LvllmError(
                f"LVLLM_SHARE_EXPERTS=1: process {self.process} of user {user} holds the name of"
                " these experts; only engines of one user share them"
            )
        logger.info("LvLLM: experts are those of process %d; this one reads none", self.process)

    def receive(self, layer: str) -> Stored:
        """The arguments of a layer, ready to compute on and read-only.

        Waits until the owner has loaded the layer. Raises ValueError if the owner ends before, or
        if a bank could not load it.
        """
        try:
            sockets.send(self._connection, layer)
            message, descriptors = sockets.receive(self._connection)
        except (OSError, EOFError):
            raise ValueError(
                f"{layer}: process {self.process}, which was loading the experts for this one,"
                " ended before it had these; its own output says why"
            ) from None
        if "error" in message:
            raise ValueError(
                f"{layer}: process {self.process} has no such experts: {message['error']}"
            )
        try:
            areas = [
                bank.map_shared(descriptor, size)
                for descriptor, size in zip(descriptors, message["areas"], strict=True)
            ]
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return {
            name: _view(areas, value) if isinstance(value, dict) else value
            for name, value in message["stored"].items()
        }

    def close_with(self, made: Any) -> None:
        """Close this follower when `made`, one of its layers, is freed.

        The next model of this process then joins anew.
        """
        weakref.finalize(made, self.close).atexit = False

    def close(self) -> None:
        self.open = False
        self._connection.close()


_current: Publisher | Follower | None = None


def ignore_weight(*arguments: Any, return_success: bool = False, **options: Any) -> bool | None:
    """The weight loader of a follower's parameters, which takes nothing.

    Since nothing is copied, the pages of the checkpoint file are never read.
    """
    return True if return_success else None


# vLLM asks a parameter's loader whether it can take single experts.
ignore_weight.supports_moe_loading = True  # type: ignore[attr-defined]


@contextmanager
def without_memory() -> Iterator[None]:
    """Tensors that are made in the block have a shape and a dtype, and no memory."""
    with torch.device("meta"):
        yield


def allocate_on_meta(size: Any, dtype: torch.dtype, *, parts: int) -> torch.Tensor:
    """The counterpart of `bank.allocate` for tensors without memory."""
    return torch.empty(size, dtype=dtype, device="meta")


def _view(areas: list[torch.Tensor], place: dict[str, Any]) -> torch.Tensor:
    dtype, shape = getattr(torch, place["dtype"]), tuple(place["shape"])
    size = math.prod(shape) * dtype.itemsize
    return areas[place["in"]][place["at"] : place["at"] + size].view(dtype).view(shape)


def _is_shared(tensor: torch.Tensor) -> bool:
    try:
        bank.shared_place(tensor)
    except ValueError:
        return False
    return True


def _aligned(size: int) -> int:
    return ceil_div(size, ALIGNMENT) * ALIGNMENT


def _in_huge_pages() -> bool:
    """Whether this process maps shared memory in huge pages. True if the kernel does not say."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    except OSError:
        return True
    return all(line.split()[1] != "0" for line in lines if line.startswith("ShmemPmdMapped:"))
