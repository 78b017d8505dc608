"""A plan as other programs read it: `lvllm plan --json`."""

from dataclasses import asdict
from typing import Any

from lvllm.planning.choice import Candidate, Plan, cache_of
from lvllm.planning.settings import as_command, as_yaml, settings_of, unserved

__all__ = ["as_data"]


def as_data(result: Plan) -> dict[str, Any]:
    """The plan for other programs. Sizes are in bytes, times in seconds, rates in tokens/s.

    If LvLLM does not serve the files, "unserved" says so, and there is no "command".
    """
    model = result.model
    return {
        "model": {
            "name": model.name,
            "weights": model.routed + model.others,
            "active_weights": model.active,
            "routed_weights": model.routed,
            "layers": len(model.layers),
            "moe_layers": [layer.number for layer in model.moe_layers],
            "experts_format": model.bits.format,
            "expert_bits": model.bits.experts,
            "other_bits": model.bits.others,
            "context": model.context,
            "unserved": unserved(model),
            "gguf": asdict(model.stored) if model.stored else None,
        },
        "machine": result.machine.model_dump(),
        "fits": result.best is not None,
        "candidates": [_candidate_data(result, one) for one in result.candidates],
    }


def _candidate_data(result: Plan, one: Candidate) -> dict[str, Any]:
    chosen = settings_of(result.model, result.machine, one)
    cache = cache_of(result, one)
    name = None if unserved(result.model) else result.model.name
    return {
        "name": one.name,
        "lacks": one.memory.lacks,
        "load": asdict(one.load),
        "expert_cache": asdict(cache) if cache else None,
        "gpu_memory": one.memory.card,
        "host_memory": one.memory.host,
        "node_memory": one.memory.node,
        "prefill_tokens_per_s": one.speed.prefill_rate,
        "decode_tokens_per_s": one.speed.decode_rate,
        "prefill_seconds": one.speed.prefill,
        "decode_seconds": one.speed.decode,
        "settings": [asdict(setting) for setting in chosen],
        "command": None if name is None else as_command(name, chosen),
        "yaml": as_yaml(name, chosen),
    }
