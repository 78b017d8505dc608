"""Rules about the installation and the environment."""

from collections.abc import Iterator

from lvllm.errors import readable
from lvllm.machine.report import Finding, MachineReport

__all__ = ["RULES"]


def engine_fails(report: MachineReport) -> Iterator[Finding]:
    if report.engine.error is not None:
        yield Finding(
            what=f"the engine does not start ({report.engine.error})",
            why="no model can be served by it",
            command="make install, in the folder of LvLLM's source",
        )


def no_vllm(report: MachineReport) -> Iterator[Finding]:
    if report.versions.vllm is None:
        yield Finding(
            what="vLLM is not installed in this Python",
            why="`vllm serve` needs it",
            command=f"pip install vllm=={report.versions.vllm_tested}",
        )


def other_vllm(report: MachineReport) -> Iterator[Finding]:
    installed = report.versions.vllm
    if installed is None or not report.versions.vllm_supported:
        return
    release = installed.partition("+")[0]
    if release not in report.versions.vllm_supported:
        yield Finding(
            what=f"vLLM is {installed}, which LvLLM was not checked with",
            why="LvLLM replaces parts of vLLM, and ends at the start if they have changed",
            command=f"pip install vllm=={report.versions.vllm_tested}",
        )


def no_libnuma(report: MachineReport) -> Iterator[Finding]:
    flavour = (report.versions.vllm or "").partition("+")[2]
    if report.versions.libnuma is False and "cpu" in flavour:
        yield Finding(
            what="libnuma is not installed",
            why="vLLM's operators for CPUs cannot be loaded without it, and no server starts",
            command="apt install libnuma1 (Fedora: dnf install numactl-libs)",
        )


def no_gpu_for_cuda(report: MachineReport) -> Iterator[Finding]:
    installed = report.versions.vllm
    if installed is None or report.gpus or report.gpu_error:
        return
    flavour = installed.partition("+")[2]
    if flavour == "" or "cu" in flavour:
        yield Finding(
            what=f"vLLM {installed} is built for CUDA, and there is no GPU",
            why="no server starts",
            command="nvidia-smi, whose driver must list one; without a GPU: install the build for"
            " CPUs (VLLM_TARGET_DEVICE=cpu)",
        )


def wrong_settings(report: MachineReport) -> Iterator[Finding]:
    for name, reason in report.wrong_settings.items():
        yield Finding(
            what=reason,
            why="LvLLM ends at the start because of it",
            command=f"unset {readable(name)}",
        )


RULES = (engine_fails, no_vllm, other_vllm, no_libnuma, no_gpu_for_cuda, wrong_settings)
