"""Collect the facts and rates of this machine in a `MachineReport`."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from lvllm.machine import findings
from lvllm.machine.facts import commands, cpu, engine, gpu, kernel, limits, versions
from lvllm.machine.facts.commands import Run
from lvllm.machine.report import Engine, Gpu, MachineReport, Measured, NodeRead, Peak
from lvllm.settings import variables

__all__ = ["collect"]

TRIES = 3
READ_SECONDS = 0.2
"""For each try."""
PAIRS_SECONDS = 3.0
"""For all tries of all pairs of nodes together. Eight nodes have 64 pairs, and so 16 ms a try."""


def collect(
    *,
    measure: bool,
    root: Path = Path("/"),
    run: Run = commands.run,
    environ: Mapping[str, str] = os.environ,
    say: Callable[[str], None] = lambda text: None,
) -> MachineReport:
    """The report about this machine, with its findings.

    It starts the engine of this process, which must not be in use. It does not raise.

    Args:
        measure: whether to measure rates, which takes 5 seconds or less.
        root: the folder under which /proc, /sys and /run lie.
        run: asks other programs.
        say: is told what is going on now.
    """
    say("looking at the machine")
    gpus, gpu_error = gpu.read(run, root)
    report = MachineReport(
        cpu=cpu.read(root),
        nodes=kernel.nodes(root),
        kernel=kernel.read(root),
        limits=limits.read(run, root),
        gpus=gpus,
        gpu_error=gpu_error,
        versions=versions.read(run),
        wrong_settings=variables.wrong(environ),
    )
    say("starting the engine")
    report.engine = engine.read(environ)
    if measure:
        report.measured = _measure(report.engine, gpus, run, say)
    report.findings = findings.of(report)
    return report


def _measure(started: Engine, gpus: list[Gpu], run: Run, say: Callable[[str], None]) -> Measured:
    found = Measured(peaks=_peaks(started))
    if started.error is not None:
        found.errors.append("reading memory: the engine did not start")
        return found
    from lvllm.machine.measure import copying, reading

    try:
        with reading.engine_reader() as reader:
            say("reading memory")
            found.read_gb_per_s = reader.local_rate(READ_SECONDS, TRIES) / 1e9
            pairs = [(a, b) for a in reader.nodes() for b in reader.nodes()]
            seconds = min(READ_SECONDS, PAIRS_SECONDS / TRIES / max(1, len(pairs)))
            for cpus, memory in pairs:
                say(f"node {cpus} reads memory of node {memory}")
                rate = reader.rate({cpus: memory}, seconds, TRIES)
                found.reads.append(
                    NodeRead(
                        cpus_of_node=cpus,
                        memory_of_node=memory,
                        threads=reader.threads(cpus),
                        read_gb_per_s=rate / 1e9,
                    )
                )
            if gpus:
                say("copying to the GPU")
                found.copies = copying.measure(reader, gpus, run)
    # PyTorch, CUDA and the kernel have many errors, and none may hide the rest of the report.
    except Exception as error:
        found.errors.append(" ".join(f"{type(error).__name__}: {error}".split())[:400])
    return found


def _peaks(started: Engine) -> list[Peak]:
    """What all threads multiply together in each arithmetic that formats are multiplied in."""
    peaks = {}
    for product in started.products:
        rate = product.giga_weights_per_s_and_core
        if rate is not None and started.threads is not None:
            peaks[product.isa, product.multiplied_as] = Peak(
                isa=product.isa,
                multiplied_as=product.multiplied_as,
                unit="GOP/s" if product.multiplied_as.startswith("int") else "GFLOP/s",
                giga_operations_per_s=2 * rate * started.threads,
            )
    return list(peaks.values())
