"""The CPU's part of a layer in stream order: tokens out to pinned memory, lk in a host callback,
the result back.

A graph that captures it has four copies and one host call a layer: its replay runs no Python,
allocates nothing and waits for nothing but the callback.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import torch

from lvllm.engine.expert_layer import ExpertLayer
from lvllm.engine.ops import raw_ops
from lvllm.gpu.accelerator import Accelerator, Stream
from lvllm.gpu.watchdog import Steps

__all__ = ["EXCHANGE_BYTES", "Exchange", "HybridCall"]

EXCHANGE_BYTES = 64 << 20
"""Of pinned memory. Larger batches go in parts, each of which reads the experts' weights again; lk
itself does so every 256 MiB of scratch memory, which are fewer tokens if a token has two experts or
more.
"""


@dataclass
class _Argument:
    """A HostCall of the engine's, which is never freed, and how often it has been queued."""

    address: int = field(default_factory=raw_ops.host_call_create)
    queued: int = 0

    def ended(self, calls: int) -> bool:
        """Whether so many of its calls have ended; after the last, nothing reads it any more."""
        return bool(raw_ops.host_call_ended(self.address) >= calls)


class Exchange:
    """Pinned memory for the largest batch, which all layers of a model share: what they put in a
    stream follows one after the other.

    Args:
        accelerator: where activations are.
        tokens: of the largest batch.
        layers: (hidden size, experts a token) of each layer.
        stream: of the copies and the callback; None: the caller's own, where there is nothing to
            overlap with. On CUDA vLLM has put the shared experts into a stream of theirs by then.
        steps: of the watchdog, which learns of each callback outside graphs.
        limit: of the pinned memory, in bytes.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        tokens: int,
        layers: Iterable[tuple[int, int]],
        stream: Stream | None = None,
        steps: Steps | None = None,
        limit: int = EXCHANGE_BYTES,
    ) -> None:
        hidden, topk = (max(sizes) for sizes in zip(*layers, strict=True))
        self.accelerator, self.stream, self.steps = accelerator, stream, steps
        self.rows = max(1, min(tokens, limit // (2 * 2 * hidden + 2 * 4 * topk)))
        """Tokens that go at a time."""
        self._x = accelerator.pinned((self.rows * hidden,), torch.bfloat16)
        self._out = accelerator.pinned((self.rows * hidden,), torch.bfloat16)
        self._ids = accelerator.pinned((self.rows * topk,), torch.int32)
        self._weights = accelerator.pinned((self.rows * topk,), torch.float32)
        self.begin, self.end = accelerator.event(), accelerator.event()
        # Those of calls outside graphs, in the order in which they were queued, and so end. There
        # are as many as ever were under way at a time.
        self._arguments: deque[_Argument] = deque()

    def views(
        self, tokens: int, hidden: int, topk: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """x, ids, weights and the result of a batch."""
        return (
            self._x.view(dtype)[: tokens * hidden].view(tokens, hidden),
            self._ids[: tokens * topk].view(tokens, topk),
            self._weights[: tokens * topk].view(tokens, topk),
            self._out.view(dtype)[: tokens * hidden].view(tokens, hidden),
        )

    def take_argument(self) -> _Argument:
        """One that no queued call reads any more; `give_back` it when it has been queued."""
        if self._arguments and self._arguments[0].ended(self._arguments[0].queued):
            return self._arguments.popleft()
        return _Argument()

    def give_back(self, argument: _Argument, layer: str) -> None:
        argument.queued += 1
        self._arguments.append(argument)
        if self.steps is not None:
            happened = partial(argument.ended, argument.queued)
            self.steps.due(f"{layer}: experts on the CPU", happened)


class HybridCall:
    """One layer on the CPU, called from a stream.

    Bit for bit what `layer(x, topk_ids, topk_weights)` computes. An error in it, such as an id that
    is no expert, makes the result NaN; its text comes out of `raw_ops.host_call_error`.

    Args:
        exchange: of the model.
        layer: whose experts are computed; the engine refuses calls after its end.
        topk: experts a token.
        name: of the layer, for the watchdog.
    """

    def __init__(
        self, exchange: Exchange, layer: ExpertLayer, topk: int, name: str = "layer"
    ) -> None:
        self._exchange, self._accelerator, self._name = exchange, exchange.accelerator, name
        self._handle = int(layer.handle)
        self._function: int = raw_ops.host_call_function()
        # A graph keeps the address of the argument, so each one that is captured is for ever this
        # batch's.
        self._captured: dict[tuple[object, ...], _Argument] = {}
        raw_ops.reserve(self._handle, exchange.rows, topk)

    def __call__(
        self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> torch.Tensor:
        """x [M, H], topk_ids and topk_weights [M, k], on the device -> [M, H] in x's dtype.

        The result is there for what the caller's stream does next.
        """
        x, out = x.contiguous(), torch.empty(x.shape, dtype=x.dtype, device=x.device)
        ids = topk_ids.to(torch.int32).contiguous()
        weights = topk_weights.to(torch.float32).contiguous()
        compute = self._accelerator.compute()
        stream = self._exchange.stream
        if stream is None:
            stream = compute
        else:
            self._accelerator.record(self._exchange.begin, compute)
            self._accelerator.wait(self._exchange.begin, stream)
        for first in range(0, len(x), self._exchange.rows):
            rows = slice(first, first + self._exchange.rows)
            self._queue(x[rows], ids[rows], weights[rows], out[rows], first, stream)
        if stream is not compute:
            self._accelerator.record(self._exchange.end, stream)
            self._accelerator.wait(self._exchange.end, compute)
        return out

    def _queue(
        self,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        out: torch.Tensor,
        first: int,
        stream: Stream,
    ) -> None:
        """A batch that the exchange has room for; its first row is `first` of the whole one."""
        shape = (*x.shape, ids.shape[1], x.dtype)
        host_x, host_ids, host_weights, host_out = views = self._exchange.views(*shape)
        copy, capturing = self._accelerator.copy, self._accelerator.capturing()
        argument = self._captured.get((first, *shape)) if capturing else None
        if argument is None:
            argument = _Argument() if capturing else self._exchange.take_argument()
            raw_ops.host_call_fill(argument.address, self._handle, *views, first)
        copy(host_x, x, stream)
        copy(host_ids, ids, stream)
        copy(host_weights, weights, stream)
        self._accelerator.call(self._function, argument.address, stream)
        copy(out, host_out, stream)
        if capturing:
            self._captured[(first, *shape)] = argument
        else:
            self._exchange.give_back(argument, self._name)
