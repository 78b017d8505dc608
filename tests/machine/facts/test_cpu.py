"""The processor, on made-up machines."""

from pathlib import Path

from lvllm.machine.facts import cpu
from lvllm.machine.report import Cpu
from tests.machine import made_up

INTEL = """\
processor\t: 0
model name\t: Intel(R) Xeon(R) Platinum 8480+
siblings\t: 4
cpu cores\t: 2
flags\t\t: fpu avx2 fma f16c avx512f amx_tile amx_int8 amx_bf16 avx512_bf16 hypervisor

processor\t: 1
model name\t: another
flags\t\t: none
"""


def two_sockets(offline: int | None = None) -> dict[str, str]:
    """Two sockets of two cores of two threads; the second threads are CPUs 4 to 7."""
    files: dict[str, str] = {"proc/cpuinfo": INTEL}
    for core in range(4):
        for thread in (core, core + 4):
            files |= made_up.cpu(thread, f"{core},{core + 4}", core // 2)
    online = [n for n in range(8) if n != offline]
    return files | {"sys/devices/system/cpu/online": ",".join(map(str, online))}


def test_two_sockets_with_smt(tmp_path: Path) -> None:
    found = cpu.read(made_up.write(tmp_path, two_sockets()))
    assert found.model == "Intel(R) Xeon(R) Platinum 8480+"
    assert (found.sockets, found.cores, found.threads_per_core) == (2, 4, 2)
    assert found.threads_per_core_by_cpuinfo == 2
    assert found.online == found.usable == list(range(8))
    assert found.usable_cores == 4
    assert found.flags == [
        "avx2", "fma", "f16c", "avx512f", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16",
    ]  # fmt: skip
    assert found.hypervisor


def test_offline_cpus_have_no_folder(tmp_path: Path) -> None:
    """The kernel removes the topology of a CPU that is switched off, and keeps its folder."""
    files = two_sockets(offline=5)
    del files["sys/devices/system/cpu/cpu5/topology/core_cpus_list"]
    files["sys/devices/system/cpu/cpu1/topology/core_cpus_list"] = "1"
    found = cpu.read(made_up.write(tmp_path, files))
    assert found.online == [0, 1, 2, 3, 4, 6, 7]
    assert (found.cores, found.threads_per_core) == (4, 2)


def test_affinity_leaves_some(tmp_path: Path) -> None:
    files = two_sockets() | {"proc/self/status": "Name:\tx\nCpus_allowed_list:\t0,4,900\n"}
    found = cpu.read(made_up.write(tmp_path, files))
    assert (found.usable, found.usable_cores) == ([0, 4], 1)


def test_old_kernels_name_siblings_otherwise(tmp_path: Path) -> None:
    files = {
        name.replace("core_cpus_list", "thread_siblings_list"): content
        for name, content in two_sockets().items()
    }
    assert cpu.read(made_up.write(tmp_path, files)).cores == 4


def test_without_sys_the_cpus_come_from_cpuinfo(tmp_path: Path) -> None:
    found = cpu.read(made_up.write(tmp_path, {"proc/cpuinfo": INTEL}))
    assert found.online == found.usable == [0, 1]
    assert (found.cores, found.sockets, found.threads_per_core) == (None, None, None)


def test_arm_has_no_flags(tmp_path: Path) -> None:
    files = {"proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd\nCPU implementer\t: 0x41\n"}
    found = cpu.read(made_up.write(tmp_path, files))
    assert (found.model, found.flags, found.flags_known) == (None, [], False)
    assert found.hypervisor is None


def test_nothing_is_there(tmp_path: Path) -> None:
    assert cpu.read(tmp_path) == Cpu()


def test_governors_and_caches(tmp_path: Path) -> None:
    folder = "sys/devices/system/cpu"
    files = two_sockets()
    for number, shared in ((0, "0-1,4-5"), (1, "0-1,4-5"), (2, "2-3,6-7")):
        files[f"{folder}/cpu{number}/cache/index3/size"] = "32768K\n"
        files[f"{folder}/cpu{number}/cache/index3/shared_cpu_list"] = f"{shared}\n"
    files[f"{folder}/cpu0/cpufreq/scaling_governor"] = "powersave\n"
    files[f"{folder}/cpu1/cpufreq/scaling_governor"] = "performance\n"
    found = cpu.read(made_up.write(tmp_path, files))
    assert found.last_level_cache_bytes == 64 << 20
    assert found.governors == ["performance", "powersave"]
