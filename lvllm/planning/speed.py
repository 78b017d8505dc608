"""Predicts how long a prompt and a decoding step take, and what limits each."""

from collections import Counter
from dataclasses import dataclass

from lvllm.planning import cpu_time, gpu_time, hits
from lvllm.planning.cpu_time import Seconds
from lvllm.planning.machine import Machine
from lvllm.planning.placement import Load, Placement, offloaded_layers, resident_layers
from lvllm.planning.shape import ModelShape

__all__ = ["Speed", "limit", "predict"]


@dataclass(frozen=True)
class Speed:
    """What users see."""

    prefill: Seconds
    """One prompt of the load's length."""
    decode: Seconds
    """One step: a token for each user."""
    prefill_rate: float
    """Tokens a second."""
    decode_rate: float
    """Tokens a second of all users together."""

    def seconds(self, load: Load) -> float:
        """How long the load's prompts and answers take, all users together."""
        prompts = load.users * sum(self.prefill.values())
        return prompts + load.answer * sum(self.decode.values())


def limit(seconds: Seconds) -> str:
    """What takes the largest part of a pass."""
    return max(seconds, key=lambda name: seconds[name])


def predict(model: ModelShape, machine: Machine, how: Placement, load: Load) -> Speed:
    """The speed of a model on a machine."""
    prefill: Counter[str] = Counter()
    for done in range(0, load.prompt, load.batch):
        tokens = min(load.batch, load.prompt - done)
        prefill.update(_pass(model, machine, how, tokens, 1, done + tokens / 2))
    context = load.prompt + load.answer / 2
    decode = _pass(model, machine, how, load.users, load.users, context)
    return Speed(
        prefill=dict(prefill),
        decode=dict(decode),
        prefill_rate=load.prompt / sum(prefill.values()),
        decode_rate=load.users / sum(decode.values()),
    )


def _pass(
    model: ModelShape, machine: Machine, how: Placement, tokens: int, ends: int, back: float
) -> Counter[str]:
    """A pass over the model of `tokens` tokens of `ends` sequences.

    On average, each token looks back at `back` others.
    """
    spent: Counter[str] = Counter()
    if not how.on_gpu:
        for layer in model.moe_layers:
            spent.update(cpu_time.experts(model, machine, how, layer, tokens))
        spent.update(cpu_time.linear(model, machine, how, tokens, ends))
        spent.update(cpu_time.attention(model, machine, tokens, ends, back))
        spent.update(cpu_time.steps(model, machine, tokens, ends))
        return spent
    streams = how.streamed_from is not None and tokens >= how.streamed_from
    kept = resident_layers(model, how.resident)
    for layer in kept:
        spent.update(gpu_time.experts(model, machine, layer, tokens))
    cached = how.cached_share(model, machine.gpus)
    for layer in offloaded_layers(model, how.resident):
        if streams:
            spent.update(gpu_time.streamed(model, machine, how, layer, tokens))
            continue
        on_cpu = cpu_time.experts(model, machine, how, layer, tokens)
        if cached:
            saved = hits.saved_reads(layer, tokens, cached)
            on_cpu = gpu_time.beside_cache(model, machine, how, layer, tokens, on_cpu, saved)
        spent.update(on_cpu)
    spent.update(gpu_time.linear(model, machine, tokens, ends))
    spent.update(gpu_time.attention(model, machine, tokens, ends, back))
    handed_over = 0 if streams else len(model.moe_layers) - len(kept)
    spent.update(gpu_time.steps(model, handed_over))
    return spent
