"""The settings that a plan for this machine chooses beside what the user gave."""

from dataclasses import dataclass, replace

from lvllm.planning import choice, rounding
from lvllm.planning.choice import Candidate
from lvllm.planning.machine import Machine
from lvllm.planning.placement import Load
from lvllm.planning.settings import SECTION, Chosen, settings_of
from lvllm.planning.shape import ModelShape
from lvllm.planning.speed import predict
from lvllm.serving.given import Given, count
from lvllm.settings.use_weight import UseWeight
from lvllm.settings.variables import DenseWeight

__all__ = ["Defaults", "choose"]

LEAST_CONTEXT = Load.context
"""Where the model's longest context does not fit, shorter ones down to this are tried."""
PROMPT, ANSWER = 2048, 256
"""Tokens that the ways to run a model are compared with, for one user."""
OF_GPUS = ("gpu_resident_moe_layers", "gpu_prefill_min_batch_size", "gpu_prefetch_window")
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
    found = _longest(model, machine, given)
    if found.memory.lacks:
        return Defaults(model, machine, None, found.memory.lacks, ())
    own_gpu = given.lvllm.intersection(OF_GPUS)
    settings = []
    for one in settings_of(model, machine, found):
        key = one.key.removeprefix(SECTION)
        if key in given.options or key in given.lvllm or (own_gpu and key in OF_GPUS):
            continue
        if key == "max-model-len":
            one = replace(one, why=_why_context(model, found.load.context))
        settings.append(one)
    if found.how.on_gpu and own_gpu:
        found = _as_given(model, machine, found, given)
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


def _as_given(model: ModelShape, machine: Machine, found: Candidate, given: Given) -> Candidate:
    """The candidate with the layers on the GPU and the threshold that the user gave."""
    resident = given.settings["gpu_resident_moe_layers"].value
    threshold = given.settings["gpu_prefill_min_batch_size"].value
    how = replace(found.how, resident=len(resident))
    if threshold != "auto":
        how = replace(how, streamed_from=threshold or None)
    speed = predict(model, machine, how, found.load)
    return Candidate("the settings that were given", how, found.load, found.memory, speed)


def _longest(model: ModelShape, machine: Machine, given: Given) -> Candidate:
    """The fastest way with the longest context that fits, or else with the shortest tried."""
    asked = count(given.options.get("max-model-len"))
    batch = count(given.options.get("max-num-batched-tokens"))
    batches = choice.BATCHES if batch is None else (batch,)
    use = _use_weight(given)
    experts = (use if use in rounding.ROUNDED else UseWeight.KEEP,)
    int8 = given.settings["dense_weight"].value == DenseWeight.INT8
    context = asked or model.context
    while True:
        prompt = max(1, min(PROMPT, context - ANSWER))
        answer = max(1, min(ANSWER, context - prompt))
        load = Load(prompt, answer, context=context, batch=batch or Load.batch)
        plan = choice.choose(
            model, machine, load, experts=experts, int8_linear=int8, batches=batches
        )
        found = next(one for one in plan.candidates if one.how.on_gpu == (machine.gpus > 0))
        if not found.memory.lacks or asked or context // 2 < LEAST_CONTEXT:
            return found
        context //= 2


def _why_context(model: ModelShape, context: int) -> str:
    if context == model.context:
        return "the model's longest context"
    return f"the KV cache of the model's longest context, {model.context}, does not fit"
