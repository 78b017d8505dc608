"""A machine as a user describes it, beside what was measured on this one."""

from collections.abc import Callable
from dataclasses import dataclass

from lvllm.planning.errors import PlanError
from lvllm.planning.machine import CPUS, GPUS, Gpu, Machine, gpu_like

__all__ = ["Description", "machine_of"]


@dataclass(frozen=True)
class Description:
    """What is known of a machine; None: as this one has it."""

    memory_bytes: float | None = None
    cores: int | None = None
    nodes: int | None = None
    read_gb_per_s: float | None = None
    isa: str | None = None
    gpus: int | None = None
    gpu: str | None = None
    gpu_memory_bytes: float | None = None
    bus_gb_per_s: float | None = None

    @property
    def whole(self) -> bool:
        """Whether nothing has to be measured here."""
        return None not in (self.memory_bytes, self.cores, self.read_gb_per_s, self.isa)


def machine_of(given: Description, here: Callable[[], Machine]) -> Machine:
    """The machine that is described. What the description lacks is asked of `here`.

    A whole description has one NUMA node and no GPU unless it says so.

    Raises:
        PlanError: if the description contradicts itself, or names an unknown part.
    """
    _check(given)
    if given.whole:
        base = Machine(
            cores=given.cores or 1,
            nodes=1,
            memory_bytes=given.memory_bytes or 1,
            read_gb_per_s=given.read_gb_per_s or 1,
            giga_products_per_core={},
        )
    else:
        base = here()
    changes: dict[str, object] = {
        name: value
        for name in ("cores", "nodes", "memory_bytes", "read_gb_per_s", "gpus")
        if (value := getattr(given, name)) is not None
    }
    if given.isa is not None:
        changes |= {"giga_products_per_core": CPUS[given.isa], "isa": given.isa}
    changes |= _gpu(given, base)
    return Machine(**(dict(base) | changes))


def _check(given: Description) -> None:
    if given.isa is not None and given.isa not in CPUS:
        raise PlanError(f"--isa {given.isa}: allowed are {', '.join(CPUS)}")
    if given.gpu is not None and given.gpu not in GPUS:
        raise PlanError(f"--gpu {given.gpu}: known are {', '.join(GPUS)}")
    if given.cores is not None and given.read_gb_per_s is None:
        raise PlanError(
            "--cores needs --bandwidth: other cores than this machine's read at another speed"
        )


def _gpu(given: Description, base: Machine) -> dict[str, object]:
    if given.gpus == 0:
        if given.gpu or given.gpu_memory_bytes or given.bus_gb_per_s:
            raise PlanError("--gpus 0 describes no GPU, and other options describe one")
        return {"gpu": None}
    card: Gpu | None = GPUS[given.gpu] if given.gpu else base.gpu
    if card is None and given.gpu_memory_bytes is not None:
        card = gpu_like(given.gpu_memory_bytes)
    if card is None:
        if given.gpus or given.bus_gb_per_s:
            raise PlanError("--gpus and --bus need --gpu or --gpu-memory: which GPU is it?")
        return {}
    changes = {"memory_bytes": given.gpu_memory_bytes, "bus_gb_per_s": given.bus_gb_per_s}
    update = {name: value for name, value in changes.items() if value is not None}
    return {"gpus": given.gpus or base.gpus or 1, "gpu": card.model_copy(update=update)}
