"""The layers of one model whose experts lie on the host, and where each batch is computed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum, auto

import torch

from lvllm.engine.expert_layer import ExpertLayer
from lvllm.engine.ops import raw_ops
from lvllm.gpu import break_even, streamed
from lvllm.gpu.accelerator import Accelerator
from lvllm.gpu.hybrid import Exchange, HybridCall
from lvllm.gpu.watchdog import StreamSteps, Watchdog
from lvllm.gpu.window import PrefetchWindow

__all__ = [
    "Offload",
    "OffloadedLayer",
    "Path",
    "check",
    "choose_path",
    "concentrated_routing",
    "watch_step",
]


class Path(Enum):
    """Where a batch is computed, of a layer whose experts lie on the host."""

    CPU = auto()
    STREAMED = auto()


def choose_path(tokens: int, capturing: bool, threshold: int) -> Path:
    """STREAMED from `threshold` tokens on, unless that is 0.

    A graph is for batches that are decoded, and how often it will be replayed nobody knows: copies
    of weights have no place in it.
    """
    return Path.STREAMED if threshold and tokens >= threshold and not capturing else Path.CPU


class OffloadedLayer:
    """One layer of an Offload. It lives as long as the model's layer, and the Offload with it."""

    call: HybridCall

    def __init__(
        self, offload: Offload, number: int, name: str, experts: ExpertLayer, topk: int, routed: int
    ) -> None:
        self.offload, self.number, self.name = offload, number, name
        self.experts, self.topk, self.routed = experts, topk, routed
        _layers[int(experts.handle)] = self

    def size(self) -> int:
        """Bytes."""
        return sum(tensor.nbytes for tensor in self.experts.tensors.values())

    def run(
        self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> torch.Tensor:
        """x [M, H], topk_ids and topk_weights [M, k], on the device -> [M, H] in x's dtype."""
        offload = self.offload
        capturing = offload.accelerator.capturing()
        if choose_path(len(x), capturing, offload.threshold) is Path.STREAMED:
            return offload.run_streamed(self, x, topk_ids, topk_weights)
        out = self.call(x, topk_ids, topk_weights)
        if not capturing:
            check()
        return out


_layers: weakref.WeakValueDictionary[int, OffloadedLayer] = weakref.WeakValueDictionary()
"""The layers of all models, by the engine's handle."""
_latest: weakref.ref[Offload] | None = None


class Offload:
    """The layers of a model, in the order in which they are computed.

    Layers are announced while the model is built and added when their weights are there. With the
    last of them, the memory that all share is allocated.

    Args:
        accelerator: where activations are.
        tokens: of the largest batch.
        threshold: batches of at least so many tokens are computed on the device; 0: none is. A
            MeasuredThreshold is replaced by a number when the last layer has been added.
        ahead: layers whose weights are copied to it before they are needed.
        watchdog_seconds: a copy or a call of lk may take; 0: any time.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        tokens: int,
        threshold: int | break_even.MeasuredThreshold = 0,
        ahead: int = 0,
        watchdog_seconds: float = 0,
    ) -> None:
        self.accelerator = accelerator
        self._auto = None if isinstance(threshold, int) else threshold
        self.threshold = threshold if isinstance(threshold, int) else 0
        self._streams = self._auto is not None or self.threshold > 0
        self._tokens, self._ahead, self._watchdog_seconds = tokens, ahead, watchdog_seconds
        self._model: weakref.ref[object] | None = None
        self._announced: list[int] = []
        self._added: weakref.WeakValueDictionary[int, OffloadedLayer] = (
            weakref.WeakValueDictionary()
        )
        self._window: PrefetchWindow | None = None
        self._watchdog: Watchdog | None = None
        self._steps: StreamSteps | None = None
        self._complete = False

    @staticmethod
    def of(number: int, model: object, make: Callable[[], Offload]) -> Offload:
        """The Offload that a layer with this number joins while its model is built: the latest, or
        a new one if that is of another `model`, or is complete, gone or was given up.
        """
        global _latest
        offload = _latest() if _latest else None
        if (
            offload is None
            or offload._model is None
            or offload._model() is not model
            or offload._complete
            or number in offload._announced
        ):
            offload = make()
            offload._model = weakref.ref(model)
            _latest = weakref.ref(offload)
        offload._announced.append(number)
        return offload

    def add(
        self, number: int, name: str, experts: ExpertLayer, topk: int, routed: int | None = None
    ) -> OffloadedLayer:
        """An announced layer whose weights are loaded, `topk` experts a token, of `routed` where
        other ranks have some of them.

        The caller keeps what it gets. Raises MemoryError, in one line, if the host's memory cannot
        be pinned or the device has too little for the window.
        """
        layer = OffloadedLayer(self, number, name, experts, topk, routed or experts.num_experts)
        if self._streams:
            for what, tensor in experts.tensors.items():
                try:
                    self.accelerator.pin(tensor)
                except RuntimeError as error:
                    raise MemoryError(f"{name}: {what}: {error}") from None
                weakref.finalize(layer, self.accelerator.unpin, tensor).atexit = False
        self._added[number] = layer
        if all(number in self._added for number in self._announced):
            self._open()
        return layer

    def _open(self) -> None:
        """Allocate what the layers share, now that all are there."""
        self._complete = True
        layers = [self._added[number] for number in sorted(self._announced)]
        watchdog = None
        if self._watchdog_seconds:
            self._watchdog = watchdog = Watchdog(self.accelerator, self._watchdog_seconds)
            weakref.finalize(self, watchdog.close).atexit = False
        exchange = Exchange(
            self.accelerator,
            self._tokens,
            {(layer.experts.hidden_size, layer.topk) for layer in layers},
            # On the host a stream of its own, so that a wait that is missing shows.
            stream=self.accelerator.stream() if self.accelerator.name == "host" else None,
            steps=watchdog.steps() if watchdog else None,
        )
        for layer in layers:
            layer.call = HybridCall(exchange, layer.experts, layer.topk, layer.name)
        if self._streams:
            weights = {layer.number: layer.experts.tensors for layer in layers}
            self._window = PrefetchWindow(self.accelerator, weights, self._ahead, watchdog)
            if self._auto is not None:
                self.threshold = self._break_even(self._auto, self._window, layers)

    def _break_even(
        self,
        auto: break_even.MeasuredThreshold,
        window: PrefetchWindow,
        layers: list[OffloadedLayer],
    ) -> int:
        """The threshold that is measured. If streaming never pays, the window's memory goes back,
        before vLLM measures what is left; what is pinned stays so, as lk has it in use anyway.
        """
        by_size = sorted(layers, key=OffloadedLayer.size)
        middle = by_size[len(layers) // 2]
        found = break_even.choose(auto, window, middle, len(layers), self._tokens)
        check()
        if not found:
            self._window = None
        return found

    def run_streamed(
        self,
        layer: OffloadedLayer,
        x: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
    ) -> torch.Tensor:
        """On the device, with the window's copy of the layer's weights."""
        window = self._window
        assert window is not None, "a layer runs before the last one is loaded"
        if _concentrated:
            ids = torch.arange(topk_ids.shape[1], device=x.device, dtype=topk_ids.dtype)
            topk_ids = ids.where(ids < layer.experts.num_experts, -1).expand_as(topk_ids)
        try:
            staged = window.stage(layer.number)
            out = streamed.run(layer.experts, staged, x, topk_ids, topk_weights)
            window.release(layer.number)
        except BaseException:
            window.abort()
            raise
        return out


_concentrated = False


@contextmanager
def concentrated_routing() -> Iterator[None]:
    """Meanwhile the tokens of a streamed batch all go to the same experts, next to each other.

    That takes the most memory of the device, two or three times as much as when they are spread:
    for whoever measures it.
    """
    global _concentrated
    _concentrated = True
    try:
        yield
    finally:
        _concentrated = False


def watch_step() -> None:
    """What the model has in the compute stream by now is due, be it the replay of a graph, of which
    no single call is known here. To be called after each step.
    """
    offload = _latest() if _latest else None
    if offload is None or offload._watchdog is None:
        return
    if offload._steps is None:
        offload._steps = offload._watchdog.follow(offload.accelerator.compute())
    offload._steps.mark(_running)


def _running() -> str:
    """Where a step that is late stands."""
    begun, ended, handle = raw_ops.host_call_progress()
    name = _name_of(handle)
    if begun > ended:
        return f"{name}: experts on the CPU"
    return f"a step whose last experts on the CPU were those of {name}"


def check() -> None:
    """Raises RuntimeError if a call of lk in any stream has met an error since the last check."""
    handle, text = raw_ops.host_call_error()
    if handle:
        raise RuntimeError(f"{_name_of(handle)}: {text}")


def _name_of(handle: int) -> str:
    layer = _layers.get(handle)
    return layer.name if layer else f"layer {handle}"


@torch.library.custom_op("lvllm::routed_experts", mutates_args=())
def routed_experts(
    x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, layer: torch.Tensor
) -> torch.Tensor:
    """The expert block of an offloaded layer on its device; `layer` is `ExpertLayer.handle`.

    An operator, since torch.compile would trace into the choice of a way.
    """
    return _layers[int(layer)].run(x, topk_ids, topk_weights)


@routed_experts.register_fake
def _routed_experts_fake(
    x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, layer: torch.Tensor
) -> torch.Tensor:
    return x.new_empty(x.shape)
