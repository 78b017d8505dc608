"""The settings that a plan for this machine chooses beside what the user gave."""

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

from lvllm.planning import choice, filling, rounding, slots
from lvllm.planning.choice import Candidate
from lvllm.planning.machine import Machine
from lvllm.planning.placement import USABLE, Load, Placement
from lvllm.planning.settings import SECTION, Chosen, settings_of
from lvllm.planning.shape import ModelShape
from lvllm.serving.given import Given, count
from lvllm.settings.resolving import Setting
from lvllm.settings.use_weight import UseWeight
from lvllm.settings.variables import DenseWeight
from lvllm.units import GIB, gib

__all__ = ["Defaults", "choose"]

LEAST_CONTEXT = Load.context
"""Where the model's longest context does not fit, shorter ones down to this are tried."""
PROMPT, ANSWER = 2048, 256
"""Tokens that the ways to run a model are compared with, for one user."""
STREAMING = ("gpu_prefill_min_batch_size", "gpu_prefetch_window")
"""Settings that belong together: if the user gives one of them, the plan chooses none of them."""


@dataclass(frozen=True)
class Defaults:
    """What the plan chose, without what the user gave."""

    model: ModelShape
    machine: Machine
    best: Candidate | None
    """None: nothing fits."""
    lacks: str | None
    """Why nothing fits."""
    settings: tuple[Chosen, ...]


def choose(model: ModelShape, machine: Machine, given: Given) -> Defaults:
    """The plan's settings for a model on this machine.

    If it has GPUs, vLLM runs on them, so that a plan without them does not count.
    """
    ranks = count(given.options.get("tensor-parallel-size"))
    if ranks is not None and machine.gpus:
        machine = machine.model_copy(update={"gpus": min(ranks, machine.gpus)})
    model = _as_loaded(model, given)
    _check_cache(model, machine, given)
    found = _longest(model, _as_shared(machine, given), given)
    if found.memory.lacks:
        return Defaults(model, machine, None, found.memory.lacks, ())
    streaming = given.lvllm.intersection(STREAMING)
    settings = []
    for one in settings_of(model, machine, found):
        key = one.key.removeprefix(SECTION)
        if key in given.options or key in given.lvllm or (streaming and key in STREAMING):
            continue
        if key == "max-model-len":
            one = replace(one, why=_why_context(model, found.load.context))
        settings.append(one)
    return Defaults(model, machine, found, None, tuple(settings))


def _as_loaded(model: ModelShape, given: Given) -> ModelShape:
    """The model with the bits that its experts have in memory if they become bf16 or fp16."""
    if _use_weight(given) != UseWeight.TO_DTYPE:
        return model
    return replace(model, bits=replace(model.bits, format="bf16", experts=16))


def _use_weight(given: Given) -> UseWeight | None:
    """The format of all layers' experts in memory; None if nothing or different ones are given."""
    rules = given.settings["moe_use_weight"].value
    return None if rules is None else rules.everywhere


def _as_shared(machine: Machine, given: Given) -> Machine:
    """The machine with what the decoding engine has of the cards' memory.

    vLLM's option says which share that is, and a prefill engine on the same cards has half of it.
    """
    if machine.gpu is None:
        return machine
    share = USABLE
    with suppress(TypeError, ValueError):  # vLLM says what is wrong with it.
        share = float(given.options.get("gpu-memory-utilization", USABLE))
    if (
        given.settings["prefill_engine"].value
        and given.settings["prefill_engine_gpu"].value is None
    ):
        share /= 2
    if not 0 < share <= 1:
        return machine
    size = machine.gpu.memory_bytes * share / USABLE
    return machine.model_copy(update={"gpu": machine.gpu.model_copy(update={"memory_bytes": size})})


def _decided(model: ModelShape, given: Given) -> filling.Given:
    """What the user has decided about the cards."""
    layers, cache, threshold = (
        given.settings[key]
        for key in ("gpu_resident_moe_layers", "gpu_expert_cache", "gpu_prefill_min_batch_size")
    )
    resident: int | None = None
    streamed: tuple[int | None, ...] | None = None
    if layers.source != "default":
        resident = sum(layer.number in layers.value for layer in model.moe_layers)
    if threshold.source != "default":
        # What is measured at the start is one of the planner's, or so it is expected.
        streamed = choice.THRESHOLDS if threshold.value == "auto" else (threshold.value or None,)
    return filling.Given(resident, None if cache.source == "default" else _size(cache), streamed)


def _size(cache: Setting) -> float | Literal["auto"]:
    """Bytes of each card. Of several cards' sizes, the planner takes the largest for all."""
    return "auto" if "auto" in cache.value else float(max(cache.value))


def _check_cache(model: ModelShape, machine: Machine, given: Given) -> None:
    """Raise SettingError for a cache that no card has room for, or that holds no expert."""
    cache = given.settings["gpu_expert_cache"]
    if machine.gpu is None or not any(cache.value) or (size := _size(cache)) == "auto":
        return
    most = machine.gpu.memory_bytes
    if size > most:
        raise cache.refuse(
            f"a GPU has {gib(most)}; allowed is less than that, or auto, which takes what is left"
        )
    use = _use_weight(given)
    if use is None and given.settings["moe_use_weight"].value is not None:
        return  # Layers have different formats.
    bits = Placement(True, use_weight=use or UseWeight.KEEP).expert_bits(model)
    least = slots.expert_bytes(model.moe_layers, bits, model.cards(machine.gpus))
    if size < least:
        raise cache.refuse(
            f"an expert takes {least / GIB:.6f} GiB of a GPU; allowed is 0, or at least that, or"
            " auto"
        )


def _longest(model: ModelShape, machine: Machine, given: Given) -> Candidate:
    """The fastest way with the longest context that fits, or else with the shortest tried."""
    asked = count(given.options.get("max-model-len"))
    batch = count(given.options.get("max-num-batched-tokens"))
    batches: tuple[int, ...] = choice.BATCHES if batch is None else (batch,)
    use = _use_weight(given)
    experts = (use if use in rounding.ROUNDED else UseWeight.KEEP,)
    int8 = given.settings["dense_weight"].value == DenseWeight.INT8
    context = asked or model.context
    decided = _decided(model, given)
    # vLLM refuses a threshold that no batch reaches.
    threshold = max((n for n in decided.streamed or () if n), default=0)
    if decided.streamed != choice.THRESHOLDS:
        batches = tuple(size for size in batches if size >= threshold) or batches
    kv_cache = count(given.options.get("kv-cache-memory-bytes")) or 0
    while True:
        prompt = max(1, min(PROMPT, context - ANSWER))
        answer = max(1, min(ANSWER, context - prompt))
        load = Load(prompt, answer, context=context, batch=batch or Load.batch, kv_cache=kv_cache)
        plan = choice.choose(
            model,
            machine,
            load,
            experts=experts,
            int8_linear=int8,
            batches=batches,
            given=decided,
        )
        found = next(one for one in plan.candidates if one.how.on_gpu == (machine.gpus > 0))
        if not found.memory.lacks or asked or context // 2 < LEAST_CONTEXT:
            return found
        context //= 2


def _why_context(model: ModelShape, context: int) -> str:
    if context == model.context:
        return "the model's longest context"
    return f"the KV cache of the model's longest context, {model.context}, does not fit"
