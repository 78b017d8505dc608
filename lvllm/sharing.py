"""One copy of the experts for several engines of a host: one loads, the others map its memory.

Engines that would load the same bytes find each other by a name, an abstract Unix socket that one
of them holds (there is no file, and the name ends with its process). Over it the owner hands out
the descriptors of each layer's memory once the layer is in the engine's order. Those have no names
either: the memory goes with the last process that maps it, however that ends, and outlives the
owner for as long. Containers with networks of their own do not find each other.
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

__all__ = ["Follower", "Owner", "apart", "follower", "held", "join", "leave", "name_of", "owner"]


ALIGNMENT = 64
"""Of small tensors that lie together: a cache line, and the engine's vector."""
LARGEST = 1 << 16
"""Bytes of a message: a layer's takes about 1000."""
MOST_DESCRIPTORS = 16

Stored = dict[str, Any]
"""Arguments of `ExpertLayer`: tensors, and what says how they are stored."""


def name_of(
    vllm_config: Any, folder: Path | None, use_weight: str, resident: Sequence[int] = ()
) -> str:
    """The same for engines whose ranks would load the same experts into the same shapes.

    `folder` has the model's files; without it the model's name stands for them. `resident` are the
    layers that an accelerator has.
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


def held(name: str) -> bool:
    """Whether an engine has taken this name for its first rank."""
    with _socket() as connection:
        try:
            connection.connect(_address(f"{name}/0"))
        except OSError:
            return False
        return True


def join(name: str) -> "Owner | Follower":
    """In a worker: take the name, or follow who has it. Again for the same name while the layers
    that were made under it live: the same object.

    Raises LvllmError if the name is another user's.
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
        except OSError:  # its owner has just ended, or does not listen yet
            connection.close()
            time.sleep(0.05)
        else:
            _current = Follower(name, connection)
            return _current


def apart() -> None:
    """In a worker whose next model's experts are its own."""
    global _current
    if _current is not None:
        _current.close()
    _current = None


def owner() -> "Owner | None":
    """What `join` made, if that is an owner."""
    return _current if isinstance(_current, Owner) and _current.open else None


def follower() -> "Follower | None":
    """What `join` made, if that is a follower."""
    return _current if isinstance(_current, Follower) and _current.open else None


class Owner:
    """The engine that loads. Answers others in threads until its first layer goes."""

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

    def moved(self, stored: Stored) -> Stored:
        """The same, with all tensors in shared memory: small ones together, for each takes pages
        and a descriptor. Biases become float32, which the engine computes with.
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
        """Offer a layer that the engine has `made` of `stored`, all in shared memory."""
        areas: dict[int, tuple[int, int]] = {}  # descriptor: number, bytes
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
        # With its memory its descriptors are closed.
        weakref.finalize(made, self.close).atexit = False

    def close(self) -> None:
        """Give the name up. Who has layers keeps them."""
        with self._changed:
            self.open = False
            self._layers = {}
            self._changed.notify_all()
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)  # ends accept()
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
        """Send each layer that is asked for, as soon as it is there."""
        with connection, suppress(OSError):
            if _peer(connection)[1] != os.getuid():
                return
            while wanted := connection.recv(LARGEST).decode():
                with self._changed:
                    self._changed.wait_for(lambda: not self.open or wanted in self._layers)
                    if not self.open:
                        return
                    text, descriptors = self._layers[wanted]
                    socket.send_fds(connection, [text], descriptors)


class Follower:
    """An engine that has its experts from another one."""

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

    def stored(self, layer: str) -> Stored:
        """A layer in the engine's order, read-only. Waits until it is loaded.

        Raises ValueError if its owner ends before.
        """
        text = b""
        descriptors: list[int] = []
        with suppress(OSError):
            self._connection.send(layer.encode())
            text, descriptors, _, _ = socket.recv_fds(self._connection, LARGEST, MOST_DESCRIPTORS)
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

    def until(self, made: Any) -> None:
        """Ends when `made`, one of the layers, goes: a later model joins anew."""
        weakref.finalize(made, self.close).atexit = False

    def close(self) -> None:
        self.open = False
        self._connection.close()


_current: Owner | Follower | None = None


def leave(*arguments: Any, return_success: bool = False, **options: Any) -> bool | None:
    """The weight loader of a follower's parameters: what is not copied is not read."""
    return True if return_success else None


# vLLM asks a parameter's loader whether it takes experts.
leave.supports_moe_loading = True  # type: ignore[attr-defined]


@contextmanager
def without_memory() -> Iterator[None]:
    """Tensors made meanwhile have a shape and a dtype alone."""
    with torch.device("meta"):
        yield


def on_meta(size: Any, dtype: torch.dtype, *, parts: int) -> torch.Tensor:
    """As `bank.allocate`, without memory."""
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
    return -(-size // ALIGNMENT) * ALIGNMENT


def _in_huge_pages() -> bool:
    """Whether this process maps shared memory so; also if the kernel does not say."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    except OSError:
        return True
    return all(line.split()[1] != "0" for line in lines if line.startswith("ShmemPmdMapped:"))


def _socket() -> socket.socket:
    """One that keeps messages apart."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def _address(name: str) -> bytes:
    return b"\0" + name.encode()


def _peer(connection: socket.socket) -> tuple[int, int]:
    """The process and the user at the other end."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    process, user, _ = struct.unpack("3i", credentials)
    return process, user
