"""What `lvllm doctor` found out about this machine, as other programs read it.

The names and units of fields stay as they are; new fields may come. None stands for "unknown": the
source is missing, not readable, or holds something else than expected.
"""

from typing import Literal

from pydantic import BaseModel, Field

__all__ = [
    "Copy",
    "Cpu",
    "Engine",
    "Finding",
    "Gpu",
    "HugePages",
    "Kernel",
    "Limit",
    "Limits",
    "MachineReport",
    "Measured",
    "Node",
    "NodeRead",
    "Peak",
    "Product",
    "Versions",
]

Limit = int | Literal["unlimited"] | None
"""A limit of the kernel or of a cgroup."""


class Cpu(BaseModel):
    """The processor, as the kernel describes it."""

    model: str | None = None
    flags: list[str] = []
    """The instruction sets that matter to the engine, by the kernel's names."""
    flags_known: bool = False
    """Whether the kernel lists instruction sets at all, so that a missing one is missing."""
    online: list[int] = []
    """The logical CPUs that are switched on; empty if unknown."""
    usable: list[int] = []
    """The logical CPUs that this process may use; empty if unknown."""
    usable_cores: int | None = None
    """The physical cores that have a usable logical CPU."""
    cores: int | None = None
    sockets: int | None = None
    threads_per_core: int | None = None
    """By the kernel's list of siblings in /sys, which the engine uses."""
    threads_per_core_by_cpuinfo: int | None = None
    """By the fields `siblings` and `cpu cores` of /proc/cpuinfo."""
    last_level_cache_bytes: int | None = None
    governors: list[str] = []
    """The frequency governors in use; empty if the kernel has none."""
    hypervisor: bool | None = None
    """Whether the CPU says that it runs in a virtual machine."""


class HugePages(BaseModel):
    """The pages of one size that are set aside."""

    page_bytes: int
    total: int | None = None
    free: int | None = None


class Node(BaseModel):
    """A NUMA node of the machine, whether or not this process may use it."""

    id: int
    cpus: list[int] | None = None
    """The logical CPUs that are switched on."""
    memory_bytes: int | None = None
    free_bytes: int | None = None
    """Free memory; page cache and reclaimable kernel memory count as free."""
    distances: dict[int, int] = {}
    """The kernel's distance to each node; 10 is the distance to itself. Empty if unknown."""


class Kernel(BaseModel):
    """The kernel's settings, and the memory that it manages."""

    version: str | None = None
    load_average: float | None = None
    """How many threads ran or waited for a CPU, in the last minute on average."""
    memory_bytes: int | None = None
    available_bytes: int | None = None
    swap_bytes: int | None = None
    swap_used_bytes: int | None = None
    transparent_huge_pages: str | None = None
    """"always", "madvise" or "never"."""
    huge_pages: list[HugePages] = []
    numa_balancing: bool | None = None
    overcommit_memory: int | None = None
    """0: the kernel guesses what may be promised; 1: all; 2: strictly limited."""


class Limits(BaseModel):
    """What this process may take of the machine."""

    cgroup_version: Literal["1", "2", "1 and 2"] | None = None
    cpu_quota_cpus: float | Literal["unlimited"] | None = None
    """The CPU time that the cgroup gets for each second."""
    memory_limit_bytes: Limit = None
    memory_used_bytes: int | None = None
    """What the process's cgroup uses, with its page cache."""
    allowed_memory_nodes: list[int] | None = None
    memlock_bytes: Limit = None
    open_files: Limit = None
    shared_memory_bytes: int | None = None
    """What is free in /dev/shm."""
    container: str | None = None
    """The kind of container, "none" if there is none."""
    virtual_machine: str | None = None
    """The kind of virtual machine, "none" if there is none."""


class Gpu(BaseModel):
    """A GPU, as nvidia-smi describes it."""

    index: int | None = None
    uuid: str | None = Field(default=None, exclude=True)
    """CUDA's own numbers may have another order. It is left out of JSON, as reports are public."""
    name: str | None = None
    memory_bytes: int | None = None
    memory_used_bytes: int | None = None
    driver: str | None = None
    cuda: str | None = None
    """The newest CUDA that the driver supports."""
    bus: str | None = None
    pcie_generation: int | None = None
    """As the link runs now. An idle GPU lets its link run at a lower one."""
    pcie_generation_most: int | None = None
    pcie_width: int | None = None
    pcie_width_most: int | None = None
    node: int | None = None
    """The NUMA node that it is attached to."""


class Product(BaseModel):
    """How the engine multiplies experts of one format."""

    format: str
    activation_bits: int
    isa: str
    multiplied_as: str
    giga_weights_per_s_and_core: float | None = None


class Engine(BaseModel):
    """The engine as it would run on this machine."""

    error: str | None = None
    """Why it does not load or start."""
    isa: str | None = None
    available_isas: list[str] = []
    threads: int | None = None
    """The threads that it has by default, or by LK_THREADS."""
    nodes: list[int] = []
    """The NUMA nodes of its threads."""
    products: list[Product] = []


class Versions(BaseModel):
    """Versions of programs; None: not installed."""

    python: str
    lvllm: str
    vllm: str | None = None
    vllm_supported: list[str] = []
    """The releases of vLLM that LvLLM was checked with."""
    vllm_tested: str = ""
    """The release of vLLM that LvLLM's tests run with."""
    installation: Literal["distribution", "plugin"] | None = None
    """Whether vLLM came with LvLLM, or LvLLM is a plugin of a stock vLLM."""
    torch: str | None = None
    transformers: str | None = None
    triton: str | None = None
    numpy: str | None = None
    glibc: str | None = None
    gcc: str | None = None
    libnuma: bool | None = None
    """Whether the library is there; None: unknown."""


class NodeRead(BaseModel):
    """How fast the threads of one NUMA node read the memory of one."""

    cpus_of_node: int
    memory_of_node: int
    threads: int
    read_gb_per_s: float


class Peak(BaseModel):
    """What all engine threads multiply together, in one arithmetic."""

    isa: str
    multiplied_as: str
    unit: Literal["GFLOP/s", "GOP/s"]
    giga_operations_per_s: float
    """A multiplication and an addition are two operations."""


class Copy(BaseModel):
    """Copies from pinned memory to one GPU."""

    gpu_index: int
    copy_gb_per_s: float
    copy_beside_reads_gb_per_s: float
    """While all engine threads read memory."""
    reads_beside_copy_gb_per_s: float
    pcie_generation_in_use: int | None = None
    """The link's generation during the copies."""


class Measured(BaseModel):
    """Rates of this machine; GB are 1e9 bytes."""

    read_gb_per_s: float | None = None
    """All threads together, where each reads the memory of its own node."""
    reads: list[NodeRead] = []
    """Each pair of nodes on which the engine has threads and memory."""
    peaks: list[Peak] = []
    copies: list[Copy] = []
    errors: list[str] = []
    """What could not be measured, and why."""


class Finding(BaseModel):
    """Something wrong."""

    what: str
    why: str
    """What it does to the user."""
    command: str
    """What mends it."""


class MachineReport(BaseModel):
    """The machine, what runs on it, how fast it is, and what is wrong."""

    schema_version: Literal[1] = 1
    cpu: Cpu = Cpu()
    nodes: list[Node] = []
    """Empty where the kernel has no NUMA information: then all is one node."""
    kernel: Kernel = Kernel()
    limits: Limits = Limits()
    gpus: list[Gpu] = []
    gpu_error: str | None = None
    """Why the GPUs are unknown, though the driver is installed."""
    versions: Versions
    engine: Engine = Engine()
    wrong_settings: dict[str, str] = {}
    """Variables of the environment that LvLLM refuses, and one line that says why, for each."""
    measured: Measured | None = None
    """None: nothing was measured."""
    findings: list[Finding] = []
