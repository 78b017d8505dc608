"""Each rule finds what is wrong in a made-up report, and nothing in a good one."""

from collections.abc import Callable

import pytest

from lvllm.machine import findings
from lvllm.machine.report import (
    Copy,
    Cpu,
    Engine,
    Gpu,
    Kernel,
    Limits,
    MachineReport,
    Measured,
    Node,
    NodeRead,
    Versions,
)
from lvllm.units import GIB

Change = Callable[[MachineReport], None]


def good() -> MachineReport:
    """Two nodes of four cores without SMT, and a GPU."""
    nodes = [
        Node(id=n, cpus=list(range(4 * n, 4 * n + 4)), memory_bytes=64 * GIB, free_bytes=60 * GIB)
        for n in range(2)
    ]
    reads = [
        NodeRead(cpus_of_node=a, memory_of_node=b, threads=4, read_gb_per_s=100 if a == b else 40)
        for a in range(2)
        for b in range(2)
    ]
    gpu = Gpu(
        index=0,
        name="G",
        pcie_generation=1,
        pcie_generation_most=4,
        pcie_width=16,
        pcie_width_most=16,
    )
    copy = Copy(
        gpu_index=0,
        copy_gb_per_s=25,
        copy_beside_reads_gb_per_s=20,
        reads_beside_copy_gb_per_s=150,
        pcie_generation_in_use=4,
    )
    return MachineReport(
        cpu=Cpu(
            flags=["avx2", "amx_tile", "amx_int8", "amx_bf16"],
            flags_known=True,
            online=list(range(8)),
            usable=list(range(8)),
            cores=8,
            sockets=2,
            threads_per_core=1,
            threads_per_core_by_cpuinfo=1,
            governors=["performance"],
            hypervisor=True,
        ),
        nodes=nodes,
        kernel=Kernel(
            memory_bytes=128 * GIB,
            swap_used_bytes=0,
            transparent_huge_pages="madvise",
            numa_balancing=False,
        ),
        limits=Limits(
            cpu_quota_cpus=8.0,
            memory_limit_bytes=128 * GIB,
            memlock_bytes="unlimited",
            shared_memory_bytes=GIB,
            allowed_memory_nodes=[0, 1],
        ),
        gpus=[gpu],
        versions=Versions(
            python="3.12.0",
            lvllm="0.1.0",
            vllm="0.32.0+lvllm0.1.0.cuda",
            vllm_supported=["0.31.0", "0.32.0"],
            vllm_tested="0.32.0",
            torch="2.13.0",
            libnuma=False,  # vLLM for GPUs does not load it.
        ),
        engine=Engine(isa="amx", available_isas=["portable", "avx2", "amx"], threads=4),
        measured=Measured(reads=reads, copies=[copy]),
    )


def change(path: str, value: object) -> Change:
    """Set one field of a report, such as `kernel.numa_balancing` or `nodes.1.memory_bytes`."""

    def apply(report: MachineReport) -> None:
        *owners, field = path.split(".")
        owner: object = report
        for name in owners:
            owner = owner[int(name)] if isinstance(owner, list) else getattr(owner, name)
        setattr(owner, field, value)

    return apply


@pytest.mark.parametrize(("threads", "why"), [(8, "the kernel stops all"), (2, "2 threads, and")])
def test_what_a_quota_does(threads: int, why: str) -> None:
    report = good()
    report.limits.cpu_quota_cpus, report.engine.threads = 2.5, threads
    (finding,) = findings.of(report)
    assert why in finding.why


def test_a_good_machine_has_no_findings() -> None:
    assert findings.of(good()) == []


def test_nothing_is_found_in_what_is_unknown() -> None:
    versions = Versions(python="3", lvllm="0", vllm="0.32.0+cpu")
    assert findings.of(MachineReport(versions=versions)) == []


@pytest.mark.parametrize(
    ("changes", "what", "command"),
    [
        ({"kernel.numa_balancing": True}, "numa_balancing", "sysctl -w kernel.numa_balancing=0"),
        ({"kernel.transparent_huge_pages": "never"}, "huge pages are off", "echo madvise >"),
        ({"kernel.swap_used_bytes": GIB}, "1.00 GiB of memory are in swap", "swapoff -a"),
        ({"limits.shared_memory_bytes": 64 << 20}, "/dev/shm has 64 MiB free", "--shm-size=1g"),
        ({"versions.libnuma": False, "versions.vllm": "0.32.0+lvllm0.1.0.cpu"},
         "libnuma is not", "apt install libnuma1"),
        ({"limits.cpu_quota_cpus": 2.5}, "time of 2.5 CPUs, and 8", "--cpus 8"),
        ({"limits.cpu_quota_cpus": 0.5}, "time of 0.5 CPUs", "LK_THREADS=1"),
        ({"limits.memory_limit_bytes": 63 * GIB}, "63.00 GiB of the machine's", "--memory"),
        ({"limits.allowed_memory_nodes": [0]}, "no memory of NUMA node 1", "--cpuset-mems 0,1"),
        ({"limits.memlock_bytes": 65536}, "`ulimit -l`", "ulimit -l unlimited"),
        ({"nodes.1.memory_bytes": 0}, "node 1 has CPUs and no memory", "--cpunodebind=0"),
        ({"nodes.0.free_bytes": 20 * GIB}, "node 0 has 20.00 GiB free", "NUMA_INTERLEAVE=1"),
        ({"cpu.usable": [0, 1, 2, 3], "limits.cpu_quota_cpus": "unlimited"},
         "no CPU of NUMA node 1", "--cpuset-cpus 0-3,4-7"),
        ({"cpu.governors": ["performance", "powersave"]}, "powersave", "--governor performance"),
        ({"cpu.threads_per_core_by_cpuinfo": 2}, "every CPU as a core", "LK_THREADS=4"),
        ({"cpu.sockets": 8}, "each of 8 CPUs as a socket", "LK_THREADS=4"),
        ({"cpu.flags": ["fma"]}, "no AVX2", "-cpu host"),
        ({"engine.available_isas": ["portable", "avx2"]}, "refuses its tile registers", "seccomp"),
        ({"measured.reads.3.read_gb_per_s": 69.0}, "node 1 reads its memory at 69 GB/s", "dmide"),
        ({"versions.vllm": None}, "vLLM is not installed", "pip install vllm==0.32.0"),
        ({"versions.vllm": "0.99.1"}, "vLLM is 0.99.1", "pip install vllm==0.32.0"),
        ({"gpus": [], "measured": None}, "built for CUDA, and there is no GPU", "nvidia-smi"),
        ({"gpus": [], "measured": None, "versions.vllm": "0.32.0"}, "vLLM 0.32.0 is", "=cpu)"),
        ({"versions.torch": "2.13.0+cpu"}, "built for CPUs", "VLLM_TARGET_DEVICE=cuda"),
        ({"engine.error": "OSError: x"}, "does not start (OSError: x)", "make install"),
        ({"wrong_settings": {"LK_X": "LK_X is not"}}, "LK_X is not", "unset LK_X"),
        ({"gpu_error": "nvidia-smi says: x"}, "nvidia-smi says: x", "--gpus all"),
        ({"gpus.0.pcie_width": 8}, "PCIe 4 x8, and PCIe 4 x16", "lspci"),
        ({"measured.copies.0.pcie_generation_in_use": 3}, "PCIe 3 x16", "lspci"),
    ],
)  # fmt: skip
def test_each_rule(changes: dict[str, object], what: str, command: str) -> None:
    report = good()
    for path, value in changes.items():
        change(path, value)(report)
    (found,) = findings.of(report)
    assert what in found.what
    assert command in found.command
    assert "\n" not in found.what + found.why + found.command


@pytest.mark.parametrize(
    "changes",
    [
        # One node has nothing to balance.
        {"kernel.numa_balancing": True, "nodes": []},
        {"kernel.swap_used_bytes": 1 << 20},
        # An idle link is no fault, and one that was not measured is not judged.
        {"measured": None},
        # Without a GPU nothing is pinned.
        {
            "limits.memlock_bytes": 65536,
            "gpus": [],
            "versions.vllm": "0.32.0+cpu",
            "versions.libnuma": True,
        },
        # A node with only memory holds no experts.
        {"nodes.1.cpus": [], "nodes.1.free_bytes": 0},
        # A small virtual machine with one socket for each CPU.
        {"cpu.sockets": 2, "cpu.online": [0, 1]},
        {"cpu.flags": [], "cpu.flags_known": False},
        {"measured.reads.3.read_gb_per_s": 71.0},
        {"limits.cpu_quota_cpus": "unlimited", "limits.memory_limit_bytes": "unlimited"},
    ],
)
def test_what_is_no_fault(changes: dict[str, object]) -> None:
    report = good()
    for path, value in changes.items():
        change(path, value)(report)
    assert findings.of(report) == []
