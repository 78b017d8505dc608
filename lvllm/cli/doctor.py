"""`lvllm doctor`: what this machine is, how fast it is, and what is wrong with it."""

import sys
from typing import Annotated

import typer
from rich.console import Console

from lvllm.machine.collect import collect
from lvllm.machine.report import Engine, Gpu, Kernel, Limits, MachineReport, Measured, Node
from lvllm.units import amount

UNKNOWN = "unknown"


def doctor(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON: a lvllm.machine.report.MachineReport.")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Measure nothing; this takes a second or two.")
    ] = False,
) -> None:
    """Say what this machine is, how fast it is for experts, and what is wrong with it.

    Each finding is one line with the command that mends it. Paste the whole output into bug
    reports. docs/doctor.md explains each line.

    The exit code is 0 if nothing is wrong, and 1 if something is.
    """
    # Progress is for the user, and the output for files and pipes.
    with Console(stderr=True).status("") as status:
        report = collect(measure=not quick, say=lambda text: status.update(f"{text} ..."))
    if as_json:
        print(report.model_dump_json(indent=2))
    else:
        print("\n".join(lines(report)))
    sys.stdout.flush()
    raise typer.Exit(1 if report.findings else 0)


def lines(report: MachineReport) -> list[str]:
    """The report as plain text, which has the same lines in a terminal and in a file."""
    found = ["Machine", *_pairs(_machine(report))]
    for node in report.nodes:
        found += _pairs({f"NUMA node {node.id}": _node(node)})
    found += ["", "Limits", *_pairs(_limits(report.limits))]
    found += ["", "GPU", *_gpus(report)]
    found += ["", "Versions", *_pairs(_versions(report))]
    found += ["", "Engine", *_engine(report.engine)]
    if report.measured is not None:
        found += ["", "Measured", *_measured(report.measured)]
    return [*found, "", *_findings(report)]


def _pairs(rows: dict[str, str]) -> list[str]:
    return [f"  {name:<24}{text}" for name, text in rows.items()]


def _or_unknown(value: object) -> str:
    return UNKNOWN if value is None or value == "" else str(value)


def _size(value: int | str | None) -> str:
    if isinstance(value, int):
        return amount(value)
    return value or UNKNOWN


def _machine(report: MachineReport) -> dict[str, str]:
    cpu, kernel = report.cpu, report.kernel
    return {
        "CPU": _or_unknown(cpu.model),
        "sockets": _or_unknown(cpu.sockets),
        "cores": f"{_or_unknown(cpu.cores)}, {_or_unknown(cpu.usable_cores)} usable",
        "threads of a core": _or_unknown(cpu.threads_per_core),
        "logical CPUs": f"{len(cpu.online) or UNKNOWN}, {len(cpu.usable) or UNKNOWN} usable",
        "instruction sets": " ".join(cpu.flags) or (UNKNOWN if not cpu.flags_known else "none"),
        "last-level caches": _size(cpu.last_level_cache_bytes),
        "frequency governor": ", ".join(cpu.governors) or UNKNOWN,
        **_kernel(kernel),
        "container, VM": f"{_or_unknown(report.limits.container)},"
        f" {_or_unknown(report.limits.virtual_machine)}"
        + (" (the CPU says: hypervisor)" if cpu.hypervisor else ""),
    }


def _kernel(kernel: Kernel) -> dict[str, str]:
    pages = [
        f"{_or_unknown(p.free)} of {_or_unknown(p.total)} free of {p.page_bytes >> 10} KiB"
        for p in kernel.huge_pages
    ]
    balancing = kernel.numa_balancing
    return {
        "load average": _or_unknown(kernel.load_average),
        "memory": f"{_size(kernel.memory_bytes)}, {_size(kernel.available_bytes)} available",
        "swap": f"{_size(kernel.swap_bytes)}, {_size(kernel.swap_used_bytes)} used",
        "kernel": _or_unknown(kernel.version),
        "transparent huge pages": _or_unknown(kernel.transparent_huge_pages),
        "huge pages": "; ".join(pages) or UNKNOWN,
        "NUMA balancing": UNKNOWN if balancing is None else "on" if balancing else "off",
        "overcommit mode": _or_unknown(kernel.overcommit_memory),
    }


def _node(node: Node) -> str:
    cpus = UNKNOWN if node.cpus is None else f"{len(node.cpus)} CPUs"
    distances = " ".join(map(str, node.distances.values())) or UNKNOWN
    return (
        f"{cpus}, {_size(node.memory_bytes)}, {_size(node.free_bytes)} free, distances {distances}"
    )


def _limits(limits: Limits) -> dict[str, str]:
    quota = limits.cpu_quota_cpus
    nodes = limits.allowed_memory_nodes
    return {
        "cgroup version": _or_unknown(limits.cgroup_version),
        "CPU quota": f"{quota:g} CPUs" if isinstance(quota, float) else _or_unknown(quota),
        "memory": f"{_size(limits.memory_limit_bytes)}, {_size(limits.memory_used_bytes)} used",
        "memory of nodes": UNKNOWN if nodes is None else ", ".join(map(str, nodes)),
        "locked memory": _size(limits.memlock_bytes),
        "open files": _or_unknown(limits.open_files),
        "free in /dev/shm": _size(limits.shared_memory_bytes),
    }


def _gpus(report: MachineReport) -> list[str]:
    if report.gpu_error is not None:
        return [f"  {UNKNOWN}: {report.gpu_error}"]
    if not report.gpus:
        return ["  none found"]
    return _pairs({f"GPU {_or_unknown(gpu.index)}": _gpu(gpu) for gpu in report.gpus})


def _gpu(gpu: Gpu) -> str:
    def link(generation: int | None, width: int | None) -> str:
        if generation is None or width is None:
            return "PCIe unknown"
        return f"PCIe {generation} x{width}"

    return (
        f"{_or_unknown(gpu.name)}, {_size(gpu.memory_bytes)}, {_size(gpu.memory_used_bytes)} used,"
        f" driver {_or_unknown(gpu.driver)}, CUDA {_or_unknown(gpu.cuda)},"
        f" {link(gpu.pcie_generation, gpu.pcie_width)} now,"
        f" {link(gpu.pcie_generation_most, gpu.pcie_width_most)} at most,"
        f" NUMA node {_or_unknown(gpu.node)}"
    )


def _versions(report: MachineReport) -> dict[str, str]:
    versions = report.versions
    kind = {"distribution": "LvLLM's distribution", "plugin": "LvLLM is a plugin"}
    vllm = versions.vllm or "not installed"
    if versions.installation is not None:
        vllm += f" ({kind[versions.installation]})"
    others = ("torch", "transformers", "triton", "numpy", "glibc", "gcc")
    return {
        "lvllm": versions.lvllm,
        "vllm": vllm,
        "Python": versions.python,
        **{name: getattr(versions, name) or "not found" for name in others},
    }


def _engine(engine: Engine) -> list[str]:
    if engine.error is not None:
        return [f"  does not start: {engine.error}"]
    nodes = ", ".join(map(str, engine.nodes))
    products = {
        f"{product.format}, {product.activation_bits} bits": f"{product.multiplied_as}"
        f" ({product.isa})"
        + (
            ""
            if product.giga_weights_per_s_and_core is None
            else f", {product.giga_weights_per_s_and_core:.0f} billion weights a second and core"
        )
        for product in engine.products
    }
    return _pairs(
        {
            "threads": f"{_or_unknown(engine.threads)}, on NUMA node {nodes or UNKNOWN}",
            "instruction set": f"{_or_unknown(engine.isa)}, of {' '.join(engine.available_isas)}",
            **products,
        }
    )


def _measured(measured: Measured) -> list[str]:
    rows = {}
    if measured.read_gb_per_s is not None:
        rows["read, all threads"] = f"{measured.read_gb_per_s:.1f} GB/s"
    for read in measured.reads:
        rows[f"node {read.cpus_of_node} from node {read.memory_of_node}"] = (
            f"{read.read_gb_per_s:.1f} GB/s, {read.threads} threads"
        )
    for peak in measured.peaks:
        name = f"{peak.multiplied_as} ({peak.isa})"
        rows[name] = f"{peak.giga_operations_per_s:.0f} {peak.unit}"
    for copy in measured.copies:
        rows[f"copy to GPU {copy.gpu_index}"] = (
            f"{copy.copy_gb_per_s:.1f} GB/s alone, {copy.copy_beside_reads_gb_per_s:.1f} GB/s while"
            f" the CPUs read {copy.reads_beside_copy_gb_per_s:.1f} GB/s,"
            f" PCIe {_or_unknown(copy.pcie_generation_in_use)}"
        )
    return [*_pairs(rows), *(f"  failed: {error}" for error in measured.errors)]


def _findings(report: MachineReport) -> list[str]:
    if not report.findings:
        return ["Nothing is wrong."]
    return [
        f"{len(report.findings)} wrong",
        *(f"  {found.what}; {found.why}: {found.command}" for found in report.findings),
    ]
