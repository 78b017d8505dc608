"""The prefetch window copies experts of the next layers to the GPU while others are computed.

Two streams take part. The copy stream writes staging buffers, and the compute stream, in which the
caller works, reads them. Each buffer has two events. The compute stream waits for `copied` before
it reads. `released` is recorded after the last read, and the copy stream waits for it before it
writes again. The host waits for neither.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from lvllm.gpu.accelerator import Accelerator, Event, Stream
from lvllm.gpu.watchdog import Watchdog
from lvllm.units import ceil_div

__all__ = ["LayerWeights", "PrefetchWindow"]

LayerWeights: TypeAlias = Mapping[str, torch.Tensor]
"""The host tensors of one layer, by ExpertLayer's argument names."""

ALIGNMENT = 256
"""The alignment of each tensor in a buffer, in bytes. Kernels load 16 bytes at a time, and CUDA
aligns its own allocations to this."""


@dataclass(frozen=True)
class _Layer:
    number: int
    weights: LayerWeights
    begins: Mapping[str, int]
    """The offset of each tensor in a buffer, in bytes."""
    size: int


@dataclass
class _Buffer:
    memory: torch.Tensor
    copied: Event
    released: Event
    holds: int = -1
    """The place of its layer in the order of computation."""
    views: dict[str, torch.Tensor] = field(default_factory=dict)
    """The layer's tensors in the memory."""
    read: int | None = None
    """The number of the layer that was computed from it last."""


@dataclass(frozen=True)
class _Staged:
    """The layer that is being computed, and the stream that reads its buffer."""

    place: int
    buffer: _Buffer
    stream: Stream


class PrefetchWindow:
    """Copies layers to the device, the next `ahead` layers before they are asked for.

    Args:
        accelerator: the device that is copied to.
        layers: the streamed layers, by their numbers in the model, in the order of computation.
            Their tensors are contiguous, on the CPU and pinned, and nobody writes them.
        ahead: LVLLM_GPU_PREFETCH_WINDOW.
        watchdog: to be told of each copy.

    A pass over the layers may begin and end at any layer. After the last layer the first one is
    copied again, so that the next pass finds its first layers there. Only one thread uses a window.

    Raises:
        ValueError: for a negative `ahead`, or a tensor that is not contiguous or not on the CPU.
        MemoryError: if the device has no room for the buffers. The message has the numbers.
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
        # The buffer that was released first comes first, since the copy stream waits least for it.
        self._free = deque(self._new_buffer(size, count) for _ in range(count))
        # These are copied or being copied, in the order of computation. The next layer's is first.
        self._coming: deque[_Buffer] = deque()
        self._staged: _Staged | None = None

    def stage(self, layer: int) -> dict[str, torch.Tensor]:
        """Return the layer's weights on the device, for the compute stream until `release`.

        The compute stream waits for their copy, and the next layers' copies are queued. If another
        layer is still staged, it is released, since one layer is computed at a time.

        Raises ValueError for a layer that is not streamed, and RuntimeError while a graph is
        captured: the graph would copy to a buffer that holds another layer during a replay.
        """
        place = self._places.get(layer)
        if place is None:
            raise ValueError(f"layer {layer} is not streamed; those that are: {[*self._places]}")
        if self._accelerator.capturing():
            raise RuntimeError(f"layer {layer} cannot be streamed while a graph is captured")
        if self._staged is not None and self._staged.place == place:
            return self._staged.buffer.views
        self._let_go()
        # Drop what was copied for layers that this pass leaves out, or for a pass that has ended.
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
        """Release the layer, once all work that reads its weights is in the compute stream.

        Raises RuntimeError if the layer is not staged.
        """
        if self._staged is None or self._staged.place != self._places.get(layer):
            raise RuntimeError(f"layer {layer} is released but not staged")
        self._let_go()

    def abort(self) -> None:
        """End the pass here, once all work of it is in the compute stream."""
        self._let_go()
        self._free.extend(self._coming)
        self._coming.clear()

    def settle(self) -> None:
        """Make the caller wait for all copies that are queued."""
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
        # Work that used this memory before may still be in the compute stream.
        accelerator.record(buffer.released, accelerator.compute())
        return buffer

    def _fetch(self, place: int) -> None:
        """Queue the copy of a layer to the free buffer that was released first."""
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
        """Allow the staged layer's buffer to be overwritten after the work that reads it."""
        if self._staged is None:
            return
        staged = self._staged
        self._accelerator.record(staged.buffer.released, staged.stream)
        staged.buffer.read = self._layers[staged.place].number
        self._free.append(staged.buffer)
        self._staged = None


def _views(layer: _Layer, memory: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the tensors of a layer in a buffer's memory."""
    return {
        name: memory[begin : begin + layer.weights[name].nbytes]
        .view(layer.weights[name].dtype)
        .view(layer.weights[name].shape)
        for name, begin in layer.begins.items()
    }


def _lay_out(number: int, weights: LayerWeights) -> _Layer:
    """Choose where each tensor of a layer lies in a buffer."""
    begins, size = {}, 0
    for name, tensor in weights.items():
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise ValueError(
                f"layer {number}: {name} is on {tensor.device} with strides {tensor.stride()},"
                " wanted a contiguous tensor on the CPU"
            )
        begins[name] = size
        size += ceil_div(tensor.nbytes, ALIGNMENT) * ALIGNMENT
    return _Layer(number, weights, begins, size)
