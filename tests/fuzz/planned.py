"""What `lvllm plan` makes of a model once its sizes are known."""

from dataclasses import replace

from lvllm.planning.choice import choose
from lvllm.planning.data import as_data
from lvllm.planning.placement import Load
from lvllm.planning.shape import ModelShape
from lvllm.planning.text import lines
from tests.planning.made_up import machine

__all__ = ["plan"]

MACHINES = (machine(), machine(gpus=1))


def plan(model: ModelShape) -> None:
    """Plan the model on a machine without and on one with a GPU, and write the plans."""
    load = Load(prompt=64, answer=16, users=1)
    load = replace(load, context=max(80, min(load.context, model.context)))
    for one in MACHINES:
        result = choose(model, one, load, batches=(2048,))
        as_data(result)
        assert lines(result)
