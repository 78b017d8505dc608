"""The prefetch window: experts of layers on their way to the GPU, ahead of those being computed.

Two streams take part. The copy stream fills buffers; the compute stream, in which the caller works,
reads them. Each buffer has two events between them: `copied`, which the compute stream waits for
before it reads, and `released`, recorded after all that reads, which the copy stream waits for
before it writes again. The host waits for neither.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from lvllm.gpu.accelerator import Accelerator, Event, Stream
from lvllm.gpu.watchdog import Watchdog

__all__ = ["LayerWeights", "PrefetchWindow"]

LayerWeights: TypeAlias = Mapping[str, torch.Tensor]
"""Host tensors of one layer, by argument name of ExpertLayer."""

ALIGNMENT = 256
"""Of each tensor in a buffer, in bytes; kernels load 16 at once, and CUDA itself aligns to this."""


@dataclass(frozen=True)
class _Layer:
    number: int
    weights: LayerWeights
    begins: Mapping[str, int]
    """Where each tensor begins in a buffer."""
    size: int


@dataclass
class _Buffer:
    memory: torch.Tensor
    copied: Event
    released: Event
    holds: int = -1
    """Place of the layer that it is for, in the order of computing."""
    views: dict[str, torch.Tensor] = field(default_factory=dict)
    """That layer's tensors in the memory."""
    read: int | None = None
    """Number of the last layer that was computed from it."""


@dataclass(frozen=True)
class _Staged:
    """The layer that is being computed."""

    place: int
    buffer: _Buffer
    stream: Stream
    """That reads it."""


class PrefetchWindow:
    """Copies layers to the device, `ahead` of them before they are asked for.

    Args:
        accelerator: whose copies and streams.
        layers: the streamed layers, by the model's numbers, in the order of computing. Contiguous
            CPU tensors, pinned, that nobody writes.
        ahead: LVLLM_GPU_PREFETCH_WINDOW.
        watchdog: to be told of each copy.

    A pass over the layers may begin at any of them and end anywhere. After the last layer comes the
    first again: the next pass finds its first layers there. One thread uses a window.

    Raises:
        ValueError: for a negative `ahead`, and tensors that are not as above.
        MemoryError: if the device has no room for the buffers, with the numbers.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        layers: Mapping[int, LayerWeights],
        ahead: int,
        watchdog: Watchdog | None = None,
    ) -> None:
        if ahead < 0:
            raise ValueError(f"ahead is {ahead}, must be at least 0")
        self._accelerator = accelerator
        self.ahead = ahead
        self._layers = [_lay_out(number, weights) for number, weights in layers.items()]
        self._places = {layer.number: place for place, layer in enumerate(self._layers)}
        self._copies = accelerator.stream()
        self._steps = watchdog.follow(self._copies) if watchdog is not None else None
        size = max((layer.size for layer in self._layers), default=0)
        self._buffers = count = min(ahead + 1, len(self._layers))
        self.staging_bytes = count * size
        # The one that was released first comes first: the copy stream waits for it least.
        self._free = deque(self._new_buffer(size, count) for _ in range(count))
        # Copied or on their way, in the order of computing; the next layer's is the first.
        self._coming: deque[_Buffer] = deque()
        self._staged: _Staged | None = None

    def stage(self, layer: int) -> dict[str, torch.Tensor]:
        """The layer's weights on the device, for the compute stream, until `release`.

        The compute stream waits for their copy. The next layers' copies are queued. If another
        layer is still staged, it is released: one is computed at a time.

        Raises ValueError for a layer that is not streamed, and RuntimeError while a graph is
        captured: it would hold a copy into a buffer that its replays do not own.
        """
        place = self._places.get(layer)
        if place is None:
            raise ValueError(f"layer {layer} is not streamed; those that are: {[*self._places]}")
        if self._accelerator.capturing():
            raise RuntimeError(f"layer {layer} cannot be streamed while a graph is captured")
        if self._staged is not None and self._staged.place == place:
            return self._staged.buffer.views
        self._let_go()
        # What was fetched for layers that this pass leaves out, or a pass that has ended.
        while self._coming and self._coming[0].holds != place:
            self._free.append(self._coming.popleft())
        if not self._coming:
            self._fetch(place)
        buffer = self._coming.popleft()
        stream = self._accelerator.compute()
        self._staged = _Staged(place, buffer, stream)
        for step in range(len(self._coming) + 1, self._buffers):
            self._fetch((place + step) % len(self._layers))
        self._accelerator.wait(buffer.copied, stream)
        return buffer.views

    def release(self, layer: int) -> None:
        """All that reads the layer's weights is in the compute stream.

        Raises RuntimeError if the layer is not staged.
        """
        if self._staged is None or self._staged.place != self._places.get(layer):
            raise RuntimeError(f"layer {layer} is released but not staged")
        self._let_go()

    def abort(self) -> None:
        """The pass ends here, with all that it will compute in the compute stream."""
        self._let_go()
        self._free.extend(self._coming)
        self._coming.clear()

    def settle(self) -> None:
        """The caller waits for all copies that are queued."""
        self._accelerator.synchronize(self._copies)

    def _new_buffer(self, size: int, count: int) -> _Buffer:
        accelerator = self._accelerator
        try:
            memory = accelerator.device_memory(size, self._copies)
        except MemoryError as error:
            raise MemoryError(
                f"LVLLM_GPU_PREFETCH_WINDOW={self.ahead} takes {count} buffers on the GPU of"
                f" {size} bytes, the largest streamed layer's: {error}; a smaller window, or fewer"
                " layers in LVLLM_GPU_RESIDENT_MOE_LAYERS, needs less"
            ) from None
        buffer = _Buffer(memory, accelerator.event(), accelerator.event())
        # Whoever had this memory before may be in the compute stream still.
        accelerator.record(buffer.released, accelerator.compute())
        return buffer

    def _fetch(self, place: int) -> None:
        """Queue the copy of a layer into the free buffer that was released first."""
        accelerator, layer, buffer = self._accelerator, self._layers[place], self._free[0]
        accelerator.wait(buffer.released, self._copies)
        if self._steps is not None and buffer.read is not None:
            self._steps.mark(f"layer {buffer.read}: experts on the GPU")
        buffer.holds, buffer.read = place, None
        buffer.views = _views(layer, buffer.memory)
        for name, target in buffer.views.items():
            accelerator.copy(target, layer.weights[name], self._copies)
        accelerator.record(buffer.copied, self._copies)
        if self._steps is not None:
            self._steps.mark(f"layer {layer.number}: copy to the GPU")
        self._coming.append(self._free.popleft())

    def _let_go(self) -> None:
        """The staged layer's buffer may be overwritten after all that is in its reader's stream."""
        if self._staged is None:
            return
        staged = self._staged
        self._accelerator.record(staged.buffer.released, staged.stream)
        staged.buffer.read = self._layers[staged.place].number
        self._free.append(staged.buffer)
        self._staged = None


def _views(layer: _Layer, memory: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of a layer in a buffer's memory."""
    return {
        name: memory[begin : begin + layer.weights[name].nbytes]
        .view(layer.weights[name].dtype)
        .view(layer.weights[name].shape)
        for name, begin in layer.begins.items()
    }


def _lay_out(number: int, weights: LayerWeights) -> _Layer:
    begins, size = {}, 0
    for name, tensor in weights.items():
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise ValueError(
                f"layer {number}: {name} is on {tensor.device} with strides {tensor.stride()},"
                " wanted a contiguous tensor on the CPU"
            )
        begins[name] = size
        size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return _Layer(number, weights, begins, size)
