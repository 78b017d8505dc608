"""Runs lk in stream order: copies tokens to pinned memory, calls lk from the stream, copies back.

A graph that captures a layer holds two kernels, which copy, and one call of lk between them. Its
replay runs no Python, allocates nothing, and waits for nothing but the call.
"""

import weakref
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import torch

from lvllm.engine.counters import Reason
from lvllm.engine.expert_layer import ExpertLayer
from lvllm.engine.ops import raw_ops
from lvllm.gpu.accelerator import Accelerator, Event, Stream
from lvllm.gpu.calls import Call, faster, through_function, through_mailbox
from lvllm.gpu.watchdog import Steps

__all__ = [
    "DEFERRING_TOKENS",
    "PINNED_BYTES",
    "HybridCall",
    "PinnedBuffers",
    "host_calls",
    "raise_host_call_error",
    "running_host_call",
]

PINNED_BYTES = 64 << 20
"""The limit of pinned memory. A larger batch is computed in parts, and each part reads the experts'
weights again. lk itself divides a batch every 256 MiB of scratch memory, which are fewer tokens if
a token has two experts or more.
"""
DEFERRING_TOKENS = 8
"""Batches of at most this many tokens defer experts. An expert that one token defers and another
does not is read twice. With 8 of 128 experts a token, evenly chosen, of which 2 are deferred, that
makes 8% more reads for 8 tokens, and 18% for 16. All layers of a pass have the same tokens, so
either all of them defer or none does.
"""


@dataclass
class _Argument:
    """A HostCall of the engine, which is never freed, and how often it has been queued."""

    address: int = field(default_factory=raw_ops.host_call_create)
    queued: int = 0

    def ended(self, calls: int) -> bool:
        """Tell whether this many of its calls have ended. After the last, nothing reads it."""
        return bool(raw_ops.host_call_ended(self.address) >= calls)


class PinnedBuffers:
    """Pinned memory for the largest batch. All layers of a model share it, since the work that they
    put in a stream runs one after the other.

    Args:
        accelerator: the device that has the activations.
        tokens: the number of tokens of the largest batch.
        layers: hidden size and experts per token of each layer.
        stream: the stream of the copies and the host calls. None means the caller's own stream: the
            shared experts, which could overlap, are in another stream of vLLM's by then.
        steps: the watchdog's sequence, which is told of each host call outside graphs.
        limit: the limit of the pinned memory in bytes.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        tokens: int,
        layers: Iterable[tuple[int, int]],
        stream: Stream | None = None,
        steps: Steps | None = None,
        limit: int = PINNED_BYTES,
    ) -> None:
        hidden, topk = (max(sizes) for sizes in zip(*layers, strict=True))
        self.accelerator, self.stream, self.steps = accelerator, stream, steps
        self.rows = max(1, min(tokens, limit // (2 * 2 * hidden + 2 * 4 * topk)))
        """The number of tokens that fit in at a time."""
        self._x = accelerator.pinned((self.rows * hidden,), torch.bfloat16)
        self._out = accelerator.pinned((self.rows * hidden,), torch.bfloat16)
        self._ids = accelerator.pinned((self.rows * topk,), torch.int32)
        self._weights = accelerator.pinned((self.rows * topk,), torch.float32)
        self.nbytes = sum(
            tensor.nbytes for tensor in (self._x, self._out, self._ids, self._weights)
        )
        """The size of the pinned memory."""
        self.begin, self.end = accelerator.event(), accelerator.event()
        self._beside: Stream | None = None
        self.call: Call = through_function(accelerator)
        """Puts a call of lk in a stream."""
        self._largest = hidden, topk
        self._deferral = 0
        # The arguments of calls outside graphs, in the order in which they were queued, and thus
        # end. There are as many as there ever were calls under way at a time.
        self._arguments: deque[_Argument] = deque()

    def beside(self) -> Stream:
        """Return a stream for calls beside the caller's own work."""
        self._beside = self._beside or self.stream or self.accelerator.stream()
        return self._beside

    def choose_call(self, setting: str, layer: ExpertLayer) -> str:
        """Choose how streams call lk, by LVLLM_GPU_CALL, and return a line about it.

        `auto` times both ways with an empty batch of `layer`.

        Raises ValueError, in one line, if `mailbox` is set and not possible.
        """
        if setting == "hostfunc":
            return setting
        if setting == "mailbox":
            try:
                self.call = through_mailbox(self.accelerator)
            except RuntimeError as error:
                raise ValueError(
                    f"LVLLM_GPU_CALL=mailbox is not possible here: {error}; allowed is hostfunc or"
                    " auto"
                ) from None
            return setting
        argument = _Argument()
        empty = self.views(0, layer.hidden_size, 1, torch.bfloat16)
        raw_ops.host_call_fill(argument.address, int(layer.handle), *empty, 0, Reason.OFF)
        self.call, said = faster(self.accelerator, argument.address)
        return said

    def defer(self, experts: int) -> None:
        """From now on, let small batches add each token's least weighted experts one layer later.

        `experts` is their number. The layers' calls must say which of them is first and last.
        """
        self._deferral = raw_ops.deferral_create(experts, DEFERRING_TOKENS, *self._largest)
        weakref.finalize(self, raw_ops.deferral_destroy, self._deferral).atexit = False

    def deferral(self, tokens: int) -> int:
        """Return the address of the engine's Deferral for a batch; 0: the batch defers nothing."""
        return self._deferral if tokens <= min(DEFERRING_TOKENS, self.rows) else 0

    def views(
        self, tokens: int, hidden: int, topk: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the pinned x [M, H], ids and weights [M, k], and result [M, H] of a batch."""
        return (
            self._x.view(dtype)[: tokens * hidden].view(tokens, hidden),
            self._ids[: tokens * topk].view(tokens, topk),
            self._weights[: tokens * topk].view(tokens, topk),
            self._out.view(dtype)[: tokens * hidden].view(tokens, hidden),
        )

    def take_argument(self) -> _Argument:
        """Take an argument that no queued call reads; `give_back` it when it has been queued."""
        if self._arguments and self._arguments[0].ended(self._arguments[0].queued):
            return self._arguments.popleft()
        return _Argument()

    def give_back(self, argument: _Argument, layer: str) -> None:
        """Keep the argument of a call that has been queued, and tell the watchdog of the call."""
        argument.queued += 1
        self._arguments.append(argument)
        if self.steps is not None:
            happened = partial(argument.ended, argument.queued)
            self.steps.due(f"{layer}: experts on the CPU", happened)


@dataclass(frozen=True)
class StartedCall:
    """A batch that lk computes. Its tensors live as long as this object."""

    accelerator: Accelerator
    given: tuple[torch.Tensor, ...]
    out: torch.Tensor
    ended: Event | None

    def end(self) -> torch.Tensor:
        """Make the compute stream wait for the result, and return it. It is [M, H] as x."""
        if self.ended is not None:
            self.accelerator.wait(self.ended, self.accelerator.compute())
        return self.out


class HybridCall:
    """One layer that is computed on the CPU, called from a stream.

    The result is bit for bit that of `layer(x, topk_ids, topk_weights)`, unless experts are
    deferred (`PinnedBuffers.defer`). After an error in lk, such as an id that is no expert, the
    result is NaN, and `raise_host_call_error` raises the error.

    Args:
        buffers: the pinned memory of the model.
        layer: the layer's experts; the engine refuses calls after the layer's end.
        topk: experts per token.
        name: the layer's name, for the watchdog and for errors.
    """

    first = last = False
    """Whether this is the first or the last of the layers that share the buffers, in a pass."""

    def __init__(
        self, buffers: PinnedBuffers, layer: ExpertLayer, topk: int, name: str = "layer"
    ) -> None:
        self.buffers, self._accelerator, self.name = buffers, buffers.accelerator, name
        self._handle = int(layer.handle)
        # A graph keeps the address of its argument for good, so an argument that was captured is
        # used for no other batch.
        self._captured: dict[tuple[object, ...], _Argument] = {}
        raw_ops.reserve(self._handle, buffers.rows, topk)
        _calls[self._handle] = self

    def __call__(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        *,
        reason: Reason = Reason.OFF,
    ) -> torch.Tensor:
        """Compute x [M, H], topk_ids and topk_weights [M, k] on the device -> [M, H] as x.

        Work that the caller puts in its stream after this call can use the result. `reason` says
        why the batch is not streamed, for the counters.
        """
        return self.start(x, topk_ids, topk_weights, reason, beside=False).end()

    def start(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        reason: Reason,
        *,
        beside: bool,
    ) -> "StartedCall":
        """Queue what `__call__` computes. With `beside`, it is in a stream of its own, and defers
        nothing: another layer of the same pass may make no call.
        """
        x, out = x.contiguous(), torch.empty(x.shape, dtype=x.dtype, device=x.device)
        ids = topk_ids.to(torch.int32).contiguous()
        weights = topk_weights.to(torch.float32).contiguous()
        compute = self._accelerator.compute()
        stream = self.buffers.beside() if beside else self.buffers.stream or compute
        if stream is not compute:
            self._accelerator.record(self.buffers.begin, compute)
            self._accelerator.wait(self.buffers.begin, stream)
        deferral = 0 if beside else self.buffers.deferral(len(x))
        for first in range(0, len(x), self.buffers.rows):
            rows = slice(first, first + self.buffers.rows)
            batch = x[rows], ids[rows], weights[rows], out[rows]
            self._queue(*batch, first, reason, deferral, stream)
        if stream is compute:
            return StartedCall(self._accelerator, (x, ids, weights), out, None)
        self._accelerator.record(self.buffers.end, stream)
        return StartedCall(self._accelerator, (x, ids, weights), out, self.buffers.end)

    def _queue(
        self,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        out: torch.Tensor,
        first: int,
        reason: Reason,
        deferral: int,
        stream: Stream,
    ) -> None:
        """Queue a batch that fits in the buffers. It begins at row `first` of the whole batch."""
        shape = (*x.shape, ids.shape[1], x.dtype)
        host_x, host_ids, host_weights, host_out = views = self.buffers.views(*shape)
        exchange, capturing = self._accelerator.exchange, self._accelerator.capturing()
        captured = (first, deferral, *shape)
        argument = self._captured.get(captured) if capturing else None
        if argument is None:
            argument = _Argument() if capturing else self.buffers.take_argument()
            raw_ops.host_call_fill(argument.address, self._handle, *views, first, reason)
            if deferral:
                raw_ops.host_call_defer(argument.address, deferral, self.first, self.last)
        exchange([(host_x, x), (host_ids, ids), (host_weights, weights)], stream)
        self.buffers.call(argument.address, stream)
        exchange([(out, host_out)], stream)
        if capturing:
            self._captured[captured] = argument
        else:
            self.buffers.give_back(argument, self.name)


_calls: weakref.WeakValueDictionary[int, HybridCall] = weakref.WeakValueDictionary()
"""All layers that are called from a stream, by the engine's handle."""


def raise_host_call_error() -> None:
    """Raise RuntimeError if a host call in any stream has met an error since the last check.

    A host call itself cannot raise, and the replay of a graph runs no Python.
    """
    handle, text = raw_ops.host_call_error()
    if handle:
        raise RuntimeError(f"{_name_of(handle)}: {text}")


def host_calls() -> tuple[int, int]:
    """Return how many host calls of this process have begun and ended."""
    begun, ended, _ = raw_ops.host_call_progress()
    return begun, ended


def running_host_call() -> str:
    """Describe where the host calls of this process stand, for a step that is late."""
    begun, ended, handle = raw_ops.host_call_progress()
    name = _name_of(handle)
    if begun > ended:
        return f"{name}: experts on the CPU"
    return f"a step whose last experts on the CPU were those of {name}"


def _name_of(handle: int) -> str:
    call = _calls.get(handle)
    return call.name if call else f"layer {handle}"
