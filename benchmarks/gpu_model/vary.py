"""How much a prediction changes if one of its rates is a quarter lower or higher."""

from collections.abc import Callable
from dataclasses import replace

from benchmarks.gpu_model.layers import Parts
from lvllm.planning.machine import Machine

__all__ = ["RATES"]

Vary = Callable[[Parts, float], Parts]


def _machine(change: Callable[[Machine, float], dict[str, object]]) -> Vary:
    def vary(parts: Parts, times: float) -> Parts:
        update = change(parts.machine, times)
        return replace(parts, machine=parts.machine.model_copy(update=update))

    return vary


def _gpu(name: str) -> Vary:
    def change(machine: Machine, times: float) -> dict[str, object]:
        assert machine.gpu, "all machines here have a GPU"
        gpu = machine.gpu.model_copy(update={name: times * getattr(machine.gpu, name)})
        return {"gpu": gpu}

    return _machine(change)


def _overhead(*names: str) -> Vary:
    def vary(parts: Parts, times: float) -> Parts:
        # A higher rate is a shorter time.
        update = {name: getattr(parts.overheads, name) / times for name in names}
        return replace(parts, overheads=replace(parts.overheads, **update))

    return vary


RATES: dict[str, Vary] = {
    "bus": _gpu("bus_gb_per_s"),
    "GPU products": _gpu("bf16_tflop_per_s"),
    "GPU memory": _gpu("read_gb_per_s"),
    "host memory": _machine(lambda one, times: {"read_gb_per_s": times * one.read_gb_per_s}),
    "lk products": _machine(
        lambda one, times: {
            "giga_products_per_core": {
                name: times * rate for name, rate in one.giga_products_per_core.items()
            }
        }
    ),
    "calls of lk": _overhead("exchange", "call", "mailbox"),
    "kernels' starts": _overhead("layer"),
    "vLLM's part of a step": _overhead("step"),
}
"""The rates, each with a function that returns the parts with this rate times a number."""
