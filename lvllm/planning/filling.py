"""Fills what is left of the cards' memory with experts: those of whole layers, or a cache."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from lvllm.planning import hits, slots
from lvllm.planning.machine import Machine
from lvllm.planning.placement import USABLE, Load, Placement, memory, offloaded_layers
from lvllm.planning.shape import ModelShape
from lvllm.units import GIB, MIB

__all__ = ["CACHE_UNIT", "KV_SHARE", "NOTHING", "Given", "filled"]

KV_SHARE = 1 / 4
"""The KV cache keeps at least this share of what is left for it and a cache of experts, as it does
with LVLLM_GPU_EXPERT_CACHE=auto. It also makes up for a plan that expects too much room."""
KV_SPARE = 1 / 8
"""The KV cache keeps so much more than its contexts take: vLLM rounds them up to blocks, and
refuses a cache that is too small for one. Whole layers leave as much in most cases, by not fitting
exactly."""
CACHE_UNIT = GIB / 10
"""A plan gives a cache of experts a whole number of these."""


@dataclass(frozen=True)
class Given:
    """What the user has decided about the cards; None: the plan does."""

    resident: int | None = None
    """How many layers are resident."""
    cache: float | Literal["auto"] | None = None
    """Bytes of each card for a cache of experts; auto: all that the KV cache does not need."""
    streamed: tuple[int | None, ...] | None = None
    """The least batches from which on all may be streamed; a None among them: no batch is."""


NOTHING = Given()


def filled(
    model: ModelShape, machine: Machine, how: Placement, load: Load, given: Given
) -> Iterator[Placement]:
    """With as many experts on the cards as fit beside all else: whole layers, or a cache."""
    if isinstance(given.cache, float):
        how = replace(how, cache=given.cache)
    # Where each batch is streamed, a resident layer or a cache saves copies, and no reads.
    decoded = how.streamed_from != 1
    whole = _most_layers(model, machine, how, load) if decoded else 0
    if given.resident is not None:
        whole = given.resident
    if given.cache != "auto":
        yield replace(how, resident=whole)
    # A plan has whole layers or a cache, and both only if the user gave one of them.
    rest = replace(how, resident=given.resident or 0)
    if how.cache and rest.resident != whole:
        yield rest
    elif given.cache == "auto":
        yield replace(rest, cache=_room_for_cache(model, machine, rest, load))
    elif (
        given.cache is None
        and decoded
        and whole < len(model.moe_layers)
        and hits.is_known(model)
        and (size := _room_for_cache(model, machine, rest, load))
    ):
        yield replace(rest, cache=size)


def _most_layers(model: ModelShape, machine: Machine, how: Placement, load: Load) -> int:
    """How many layers' experts fit on the cards. Where there is a cache, one layer is for it."""
    least, most = 0, len(model.moe_layers) - (how.cache > 0)
    while least < most:
        middle = (least + most + 1) // 2
        more = replace(how, resident=middle)
        if memory(model, machine, more, load).card_lacks:
            most = middle - 1
        else:
            least = middle
    return least


def _room_for_cache(model: ModelShape, machine: Machine, how: Placement, load: Load) -> float:
    """Bytes of each card that a cache of experts may have; 0 if it cannot have any."""
    layers, bits = offloaded_layers(model, how.resident), how.expert_bits(model)
    formats = [part.format for part in how.expert_parts(model)]
    if not machine.gpu or not layers or not slots.has_kernels(model, formats, machine.gpus):
        return 0
    card = memory(model, machine, how, load).card
    free = USABLE * machine.gpu.memory_bytes - sum(card.values()) + card["KV cache"]
    kept = max(KV_SHARE * free, (1 + KV_SPARE) * card["KV cache"] + 64 * MIB)
    room = CACHE_UNIT * math.floor(
        (free - kept - slots.beside_slots(model, layers, load.batch)) / CACHE_UNIT
    )
    if slots.count(layers, bits, machine.gpus, room) < 1:
        return 0
    experts = sum(layer.experts for layer in layers)
    whole = experts * slots.expert_bytes(layers, bits, machine.gpus)
    return min(room, CACHE_UNIT * math.ceil(whole / CACHE_UNIT))
