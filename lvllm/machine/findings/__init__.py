"""What is wrong with a machine. Each rule is a function of the report alone."""

from lvllm.machine.findings import cpus, gpus, memory, software
from lvllm.machine.report import Finding, MachineReport

__all__ = ["of"]

RULES = (*software.RULES, *cpus.RULES, *memory.RULES, *gpus.RULES)


def of(report: MachineReport) -> list[Finding]:
    """All findings, those about software first. Nothing is found in what is unknown."""
    return [finding for rule in RULES for finding in rule(report)]
