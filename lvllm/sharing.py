"""One copy of the experts for several engines of a host: one loads it, the others map its memory.

Engines that would load the same bytes find each other by a name. The name is an abstract Unix
socket, which is no file and is free again when the process that holds it ends. Through the socket
the owner hands out the file descriptors of each layer's memory, once the layer is in the order in
which the engine computes. The memory has no name either. It lives until the last process that maps
it ends, for whatever reason, and so may outlive its owner. Containers with network namespaces of
their own do not find each other.
"""

import hashlib
import json
import math
import os
import socket
import struct
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from lvllm.engine import bank
from lvllm.errors import LvllmError
from lvllm.log import logger
from lvllm.units import ceil_div

__all__ = [
    "Follower",
    "Owner",
    "allocate_on_meta",
    "follower",
    "ignore_weight",
    "is_taken",
    "join",
    "name_of",
    "owner",
    "stop",
    "without_memory",
]


ALIGNMENT = 64
"""Small tensors begin at multiples of this many bytes: a cache line, and a vector of the engine."""
MESSAGE_BYTES = 1 << 16
"""The largest message that is read. The message about a layer takes about 1000 bytes."""
MOST_DESCRIPTORS = 16

Stored = dict[str, Any]
"""Arguments of `ExpertLayer`: tensors, and how their values are stored."""


def name_of(
    vllm_config: Any, folder: Path | None, use_weight: str, resident: Sequence[int] = ()
) -> str:
    """The name under which engines share, if their ranks would load the same experts alike.

    `folder` has the model's files; without it the model's name is taken for them. `resident` are
    the layers whose experts are on an accelerator.
    """
    from vllm import __version__

    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    speculative = vllm_config.speculative_config
    files: list[Any] = [model.model, model.revision]
    if folder is not None:
        status = [file.stat() for file in sorted(folder.glob("*.safetensors"))]
        files = [(s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns) for s in status]
    same = [
        __version__,
        files,
        model.hf_config.to_dict(),
        str(model.dtype),
        model.quantization,
        use_weight,
        resident,
        parallel.tensor_parallel_size,
        parallel.pipeline_parallel_size,
        parallel.data_parallel_size,
        parallel.enable_expert_parallel,
        parallel.expert_placement_strategy,
        speculative and (speculative.method, speculative.model),
    ]
    digest = hashlib.sha256(json.dumps(same, default=str, sort_keys=True).encode()).hexdigest()
    return f"lvllm/{os.getuid()}/{digest[:32]}"


def is_taken(name: str) -> bool:
    """Whether the first rank of some engine holds this name."""
    with _socket() as connection:
        try:
            connection.connect(_address(f"{name}/0"))
        except OSError:
            return False
        return True


def join(name: str) -> "Owner | Follower":
    """In a worker: take the name, or follow the process that holds it.

    Further calls with the same name return the same object, as long as the layers that were made
    under that name exist. Raises LvllmError if another user's process holds the name.
    """
    global _current
    if _current is not None and _current.name == name and _current.open:
        return _current
    if _current is not None:
        _current.close()
    while True:
        listening = _socket()
        try:
            listening.bind(_address(name))
        except OSError:
            listening.close()
        else:
            _current = Owner(name, listening)
            return _current
        connection = _socket()
        try:
            connection.connect(_address(name))
        except OSError:  # The owner has just ended, or does not listen yet.
            connection.close()
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


def owner() -> "Owner | None":
    """The owner that `join` has made in this process, or None."""
    return _current if isinstance(_current, Owner) and _current.open else None


def follower() -> "Follower | None":
    """The follower that `join` has made in this process, or None."""
    return _current if isinstance(_current, Follower) and _current.open else None


class Owner:
    """The engine that loads the experts.

    Threads answer the other engines until the first of the layers is freed.
    """

    def __init__(self, name: str, listening: socket.socket) -> None:
        self.name = name
        self.open = True
        self._listening = listening
        self._layers: dict[str, tuple[bytes, list[int]]] = {}
        self._changed = threading.Condition()
        listening.listen()
        threading.Thread(target=self._accept, name="lvllm-share", daemon=True).start()
        logger.info(
            "LvLLM: experts lie in shared memory; other engines take them from process %d",
            os.getpid(),
        )

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
        text = json.dumps({"areas": sizes, "stored": message}).encode()
        if len(self._layers) == 0 and sum(sizes) >= 64 << 20 and not _in_huge_pages():
            logger.warning_once(
                "LvLLM: shared experts lie in pages of 4 KiB here, which costs decoding up to a"
                " fifth: Linux makes them huge from 6.1 on, while it has memory in one piece"
            )
        with self._changed:
            self._layers[layer] = text, list(areas)
            self._changed.notify_all()
        # When the layer is freed, the descriptors of its memory are closed.
        weakref.finalize(made, self.close).atexit = False

    def close(self) -> None:
        """Give the name up. Processes that have mapped layers keep them."""
        with self._changed:
            self.open = False
            self._layers = {}
            self._changed.notify_all()
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)  # This ends accept().
        self._listening.close()

    def _accept(self) -> None:
        while True:
            try:
                connection = self._listening.accept()[0]
            except OSError:
                return
            threading.Thread(
                target=self._answer, args=(connection,), name="lvllm-share", daemon=True
            ).start()

    def _answer(self, connection: socket.socket) -> None:
        """Send each layer that the other process asks for, as soon as it is published."""
        with connection, suppress(OSError):
            if _peer(connection)[1] != os.getuid():
                return
            while wanted := connection.recv(MESSAGE_BYTES).decode():
                with self._changed:
                    self._changed.wait_for(lambda: not self.open or wanted in self._layers)
                    if not self.open:
                        return
                    text, descriptors = self._layers[wanted]
                    socket.send_fds(connection, [text], descriptors)


class Follower:
    """An engine that takes its experts from another one."""

    def __init__(self, name: str, connection: socket.socket) -> None:
        self.name = name
        self.open = True
        self._connection = connection
        self.process, user = _peer(connection)
        if user != os.getuid():
            self.close()
            raise LvllmError(
                f"LVLLM_SHARE_EXPERTS=1: process {self.process} of user {user} holds the name of"
                " these experts; only engines of one user share them"
            )
        logger.info("LvLLM: experts are those of process %d; this one reads none", self.process)

    def receive(self, layer: str) -> Stored:
        """The arguments of a layer, ready to compute on and read-only.

        Waits until the owner has loaded the layer. Raises ValueError if the owner ends before.
        """
        text = b""
        descriptors: list[int] = []
        with suppress(OSError):
            self._connection.send(layer.encode())
            text, descriptors, _, _ = socket.recv_fds(
                self._connection, MESSAGE_BYTES, MOST_DESCRIPTORS
            )
        if not text:
            raise ValueError(
                f"{layer}: process {self.process}, which was loading the experts for this one,"
                " ended before it had these; its own output says why"
            )
        message = json.loads(text)
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


_current: Owner | Follower | None = None


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


def _socket() -> socket.socket:
    """A Unix socket that keeps messages apart, as a stream would not."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def _address(name: str) -> bytes:
    return b"\0" + name.encode()


def _peer(connection: socket.socket) -> tuple[int, int]:
    """The numbers of the process and of the user at the other end."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    process, user, _ = struct.unpack("3i", credentials)
    return process, user
