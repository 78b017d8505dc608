"""Measures this machine for a command that plans."""

import torch
from rich.console import Console

from lvllm.machine.collect import collect
from lvllm.machine.report import MachineReport
from lvllm.planning.machine import Machine
from lvllm.planning.measured import of_report

__all__ = ["this_machine", "this_report"]


def this_report() -> MachineReport:
    """The report about this machine, which takes 5 s or less, with its progress shown."""
    with Console(stderr=True).status("") as status:
        return collect(measure=True, say=lambda text: status.update(f"{text} ..."))


def this_machine() -> Machine:
    """This machine as `vllm serve` uses it: a PyTorch without CUDA uses no GPU.

    Raises PlanError.
    """
    found = of_report(this_report())
    return found if torch.version.cuda else found.model_copy(update={"gpus": 0, "gpu": None})
