"""Rules about GPUs, their links, and the memory that is pinned for them."""

from collections.abc import Iterator

from lvllm.machine.report import Finding, Gpu, MachineReport
from lvllm.units import gib

__all__ = ["RULES"]


def gpu_unknown(report: MachineReport) -> Iterator[Finding]:
    if report.gpu_error is not None:
        yield Finding(
            what=report.gpu_error,
            why="vLLM cannot use the GPU",
            command="nvidia-smi (in Docker: docker run --gpus all)",
        )


def torch_without_cuda(report: MachineReport) -> Iterator[Finding]:
    if report.gpus and (report.versions.torch or "").endswith("+cpu"):
        yield Finding(
            what=f"there is a GPU, and PyTorch {report.versions.torch} is built for CPUs",
            why="vLLM runs on the CPU alone",
            command="VLLM_TARGET_DEVICE=cuda make install",
        )


def small_memlock(report: MachineReport) -> Iterator[Finding]:
    limit, memory = report.limits.memlock_bytes, report.kernel.memory_bytes
    if report.gpus and isinstance(limit, int) and memory and limit < memory // 2:
        yield Finding(
            what=f"`ulimit -l` allows {gib(limit)} of locked memory",
            why="experts that a GPU copies are pinned, and the driver may be refused",
            command="ulimit -l unlimited (Docker: --ulimit memlock=-1; systemd:"
            " LimitMEMLOCK=infinity)",
        )


def narrow_link(report: MachineReport) -> Iterator[Finding]:
    copies = report.measured.copies if report.measured else []
    in_use = {copy.gpu_index: copy.pcie_generation_in_use for copy in copies}
    for gpu in report.gpus:
        # An idle GPU lowers the generation, but not the width. So the generation is judged only if
        # it was asked for during copies.
        slower = _below(in_use.get(gpu.index or 0), gpu.pcie_generation_most)
        if slower or _below(gpu.pcie_width, gpu.pcie_width_most):
            generation = in_use.get(gpu.index or 0) or gpu.pcie_generation
            yield Finding(
                what=f"the link of GPU {_name(gpu)} is PCIe {generation} x{gpu.pcie_width}, and"
                f" PCIe {gpu.pcie_generation_most} x{gpu.pcie_width_most} is possible",
                why="weights are copied to the GPU more slowly",
                command=f"lspci -vv -s {gpu.bus or 'BUS'} (LnkCap, LnkSta), then move the GPU to"
                " another slot or replace its riser",
            )


def _below(now: int | None, most: int | None) -> bool:
    return now is not None and most is not None and now < most


def _name(gpu: Gpu) -> str:
    return " ".join(str(part) for part in (gpu.index, gpu.name) if part is not None)


RULES = (gpu_unknown, torch_without_cuda, small_memlock, narrow_link)
