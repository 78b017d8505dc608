"""Reading the kernel's files: what is understood, and that nothing raises."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lvllm.machine import findings
from lvllm.machine.facts import cpu, files, gpu, kernel, limits
from lvllm.machine.report import MachineReport, Versions
from tests.machine import made_up

CPU, NODE, GROUP = "sys/devices/system/cpu", "sys/devices/system/node", "sys/fs/cgroup"
PATHS = [
    "proc/cpuinfo", "proc/meminfo", "proc/loadavg", "proc/self/status", "proc/self/limits",
    "proc/self/cgroup", "proc/sys/kernel/osrelease", "proc/sys/kernel/numa_balancing",
    "proc/sys/vm/overcommit_memory", "sys/kernel/mm/transparent_hugepage/enabled",
    "sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", f"{CPU}/online",
    f"{CPU}/cpu0/topology/core_cpus_list", f"{CPU}/cpu0/topology/physical_package_id",
    f"{CPU}/cpu0/cpufreq/scaling_governor", f"{CPU}/cpu0/cache/index3/size",
    f"{CPU}/cpu0/cache/index3/shared_cpu_list", f"{NODE}/node0/cpulist", f"{NODE}/node0/meminfo",
    f"{NODE}/node0/distance", f"{NODE}/node1/meminfo", f"{GROUP}/cpu.max", f"{GROUP}/memory.max",
    f"{GROUP}/memory.current", f"{GROUP}/cpu/cpu.cfs_quota_us", f"{GROUP}/cpu/cpu.cfs_period_us",
    f"{GROUP}/memory/memory.limit_in_bytes",
]  # fmt: skip
WORDS = st.sampled_from(
    ["0", "1", "-1", "3-1", "0-99999999999", "0-3,8", "max", "100000", "0::/", "4:cpu:/", "\n",
     "4:memory:/a/../b", "[always]", "12K", "MemTotal:", "MemFree:", "kB", "processor:", "flags:",
     "siblings:", "avx2", "Cpus_allowed_list:", "0-1"]
)  # fmt: skip
GARBAGE = st.one_of(
    st.binary(max_size=60),
    st.lists(WORDS, max_size=12).map(lambda words: " ".join(words).encode()),
)


@pytest.mark.parametrize(
    ("written", "ids"),
    [
        ("0-3,8", [0, 1, 2, 3, 8]),
        ("", []),
        ("5", [5]),
        ("3,1", [1, 3]),
        (None, None),
        ("a", None),
        ("3-1", None),
        ("-1", None),
        ("0-", None),
        ("0-99999999999", None),
        ("٣", None),
    ],
)
def test_lists_of_numbers(written: str | None, ids: list[int] | None) -> None:
    assert files.id_list(written) == ids


@pytest.mark.parametrize(
    ("written", "value"),
    [("7", 7), ("007", 7), ("-7", None), ("7 ", None), ("", None), ("9" * 5000, None)],
)
def test_numbers(written: str, value: int | None) -> None:
    assert files.number(written) == value


def test_a_folder_in_place_of_a_file(tmp_path: Path) -> None:
    for path in PATHS:
        (tmp_path / path).mkdir(parents=True)
    _facts(tmp_path, "")


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(PATHS), GARBAGE), st.text(max_size=40))
def test_garbage_raises_nothing(content: dict[str, bytes], said: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        _facts(made_up.write(Path(folder), content), said)


def _facts(root: Path, said: str) -> None:
    """The report of this root goes through JSON, and the rules take it."""

    def run(command: object) -> str:
        return said

    gpus, error = gpu.read(run, root)
    report = MachineReport(
        cpu=cpu.read(root),
        nodes=kernel.nodes(root),
        kernel=kernel.read(root),
        limits=limits.read(run, root),
        gpus=gpus,
        gpu_error=error,
        versions=Versions(python="3", lvllm="0"),
    )
    report.findings = findings.of(report)
    assert MachineReport.model_validate_json(report.model_dump_json()) == report
