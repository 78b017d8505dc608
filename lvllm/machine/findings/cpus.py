"""Rules about processors and the time that this process gets of them."""

from collections.abc import Iterator

from lvllm.machine.report import Finding, MachineReport
from lvllm.units import ranges

__all__ = ["RULES"]

ENOUGH_READ = 0.7
"""A node that reads slower than this part of the fastest one lacks memory modules or shares them.
Repeated measurements of equal nodes differ by less than a tenth."""


def cpu_quota(report: MachineReport) -> Iterator[Finding]:
    quota, cpus = report.limits.cpu_quota_cpus, len(report.cpu.usable)
    if isinstance(quota, float | int) and 0 < quota < cpus:
        threads = report.engine.threads
        yield Finding(
            what=f"the cgroup gets the time of {quota:g} CPUs, and {cpus} are visible",
            why="the kernel stops all threads whenever the quota of a period is used up"
            if threads is None or threads > quota
            else f"the engine has {threads} threads, and the other CPUs are not used",
            command=f"docker update --cpus {cpus} CONTAINER"
            f" (systemd: CPUQuota={100 * cpus}%), or LK_THREADS={max(1, int(quota))}",
        )


def nodes_left_out(report: MachineReport) -> Iterator[Finding]:
    usable = set(report.cpu.usable)
    if not usable:
        return
    left_out = [node.id for node in report.nodes if node.cpus and usable.isdisjoint(node.cpus)]
    if left_out:
        nodes = ", ".join(map(str, left_out))
        cpus = ",".join(ranges(node.cpus) for node in report.nodes if node.cpus)
        yield Finding(
            what=f"this process may use no CPU of NUMA node {nodes}",
            why="their cores and the bandwidth of their memory are not used",
            command=f"docker update --cpuset-cpus {cpus} CONTAINER, or start without taskset"
            " and numactl",
        )


def powersave(report: MachineReport) -> Iterator[Finding]:
    if "powersave" in report.cpu.governors:
        yield Finding(
            what="the CPU frequency governor is powersave",
            why="cores run slower than they could, above all between short bursts of work",
            command="cpupower frequency-set --governor performance",
        )


def hidden_siblings(report: MachineReport) -> Iterator[Finding]:
    """SMT siblings that look like cores: the engine would give each a thread."""
    cpu = report.cpu
    if cpu.threads_per_core != 1:
        return
    threads = cpu.threads_per_core_by_cpuinfo or 1
    if threads > 1:
        yield Finding(
            what=f"/sys shows every CPU as a core, and /proc/cpuinfo says {threads} threads a core",
            why="two engine threads share a core's vector units and slow each other down",
            command=f"LK_THREADS={max(1, len(cpu.usable) // threads)}",
        )
    elif cpu.hypervisor and len(cpu.online) > 2 and cpu.sockets == len(cpu.online):
        yield Finding(
            what=f"the virtual machine shows each of {len(cpu.online)} CPUs as a socket of its own",
            why="SMT siblings look like cores, and the engine cannot tell them apart",
            command=f"LK_THREADS={max(1, len(cpu.usable) // 2)}, or give the machine its real"
            " topology (QEMU: -smp cores=N,threads=2; libvirt: <topology>)",
        )


def no_avx2(report: MachineReport) -> Iterator[Finding]:
    # Other architectures than x86-64 have no `flags` in /proc/cpuinfo.
    if report.cpu.flags_known and "avx2" not in report.cpu.flags:
        yield Finding(
            what="the CPU shows no AVX2",
            why="the engine runs portable code, at a fraction of the speed",
            command="in a virtual machine, pass the host's CPU through (QEMU: -cpu host; libvirt:"
            " <cpu mode='host-passthrough'/>); otherwise another CPU is needed",
        )


def amx_refused(report: MachineReport) -> Iterator[Finding]:
    listed = {"amx_tile", "amx_int8", "amx_bf16"} <= set(report.cpu.flags)
    if listed and report.engine.available_isas and "amx" not in report.engine.available_isas:
        yield Finding(
            what="the CPU has AMX, and the kernel refuses its tile registers",
            why="long prompts are multiplied several times slower",
            command="docker run --security-opt seccomp=unconfined, and Linux 5.16 or newer"
            f" (here: {report.kernel.version or 'unknown'})",
        )


def slow_node(report: MachineReport) -> Iterator[Finding]:
    reads = report.measured.reads if report.measured else []
    local = {r.cpus_of_node: r.read_gb_per_s for r in reads if r.cpus_of_node == r.memory_of_node}
    best = max(local.values(), default=0.0)
    for node, rate in local.items():
        if rate < ENOUGH_READ * best:
            yield Finding(
                what=f"NUMA node {node} reads its memory at {rate:.0f} GB/s, and the best node at"
                f" {best:.0f} GB/s",
                why="every layer waits for the slowest node",
                command="dmidecode --type memory (are all channels of the socket filled?), and end"
                " other programs on the node: numastat -p PID",
            )


RULES = (
    no_avx2,
    amx_refused,
    cpu_quota,
    nodes_left_out,
    hidden_siblings,
    powersave,
    slow_node,
)
