"""The processor: model, instruction sets, cores, sockets, caches and governors."""

from collections import Counter
from pathlib import Path

from lvllm.machine.facts.files import id_list, number, numbered, text, word
from lvllm.machine.report import Cpu

__all__ = ["last_level_cache_bytes", "model", "read", "status_field"]

FLAGS = (
    "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_vbmi",
    "avx512vbmi", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16",
)  # fmt: skip
"""What the engine's instruction sets are made of, by the names in /proc/cpuinfo."""


def read(root: Path = Path("/")) -> Cpu:
    """The processor by the files below `root`."""
    folder = root / "sys/devices/system/cpu"
    described = _fields(root)
    flags = described.get("flags")
    online = id_list(text(folder / "online")) or sorted(
        cpu for cpu in map(number, _all_of(root, "processor")) if cpu is not None
    )
    usable = id_list(status_field(root, "Cpus_allowed_list"))
    usable = online if usable is None else [cpu for cpu in usable if not online or cpu in online]
    cpus = numbered(folder, "cpu")
    cores = {cpu: _core(cpus[cpu]) for cpu in online if cpu in cpus}
    known = bool(online) and all(cores.get(cpu) is not None for cpu in online)
    sockets = {word(cpus[cpu] / "topology/physical_package_id") for cpu in online if cpu in cpus}
    siblings, per_socket = number(described.get("siblings")), number(described.get("cpu cores"))
    return Cpu(
        model=described.get("model name"),
        flags=[flag for flag in FLAGS if flag in (flags or "").split()],
        flags_known=bool(flags),
        online=online,
        usable=usable,
        usable_cores=len({cores[cpu] for cpu in usable}) if known else None,
        cores=len(set(cores.values())) if known else None,
        sockets=len(sockets) if sockets and all(number(id) is not None for id in sockets) else None,
        threads_per_core=max(Counter(cores.values()).values()) if known else None,
        threads_per_core_by_cpuinfo=siblings // per_socket if siblings and per_socket else None,
        last_level_cache_bytes=last_level_cache_bytes(root),
        governors=sorted(
            {
                g
                for cpu in online
                if cpu in cpus
                if (g := word(cpus[cpu] / "cpufreq/scaling_governor"))
            }
        ),
        hypervisor="hypervisor" in flags.split() if flags else None,
    )


def model(root: Path = Path("/")) -> str | None:
    """The name of the processor's model."""
    return _fields(root).get("model name")


def last_level_cache_bytes(root: Path = Path("/")) -> int | None:
    """Bytes of all last-level caches together."""
    caches: dict[str, int] = {}
    for cpu in numbered(root / "sys/devices/system/cpu", "cpu").values():
        kib = number((word(cpu / "cache/index3/size") or "").removesuffix("K"))
        shared = text(cpu / "cache/index3/shared_cpu_list")
        if kib is not None and shared is not None:
            caches[shared] = kib << 10
    return sum(caches.values()) or None


def _core(cpu: Path) -> int | None:
    """A core is identified by its lowest sibling, as the engine does."""
    siblings = id_list(text(cpu / "topology/core_cpus_list"))
    if not siblings:  # kernels before 5.3
        siblings = id_list(text(cpu / "topology/thread_siblings_list"))
    return siblings[0] if siblings else None


def _fields(root: Path) -> dict[str, str]:
    """What /proc/cpuinfo says of the first CPU. Machines mix no models."""
    fields: dict[str, str] = {}
    for line in (text(root / "proc/cpuinfo") or "").splitlines():
        name, colon, value = line.partition(":")
        if colon and value.strip():
            fields.setdefault(name.strip(), value.strip())
    return fields


def _all_of(root: Path, name: str) -> list[str]:
    """The values of one field of /proc/cpuinfo for all CPUs."""
    lines = [line.partition(":") for line in (text(root / "proc/cpuinfo") or "").splitlines()]
    return [value.strip() for field, _, value in lines if field.strip() == name]


def status_field(root: Path, name: str) -> str | None:
    """One field of this process's status. The kernel has intersected affinity and cpuset."""
    for line in (text(root / "proc/self/status") or "").splitlines():
        field, _, value = line.partition(":")
        if field == name:
            return value.strip()
    return None
