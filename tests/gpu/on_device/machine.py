"""Prints what a machine with a GPU is, and which packages it lacks.

    python3 -m tests.gpu.on_device.machine [vllm]

With `vllm`, it says whether vLLM is there and has LvLLM as a plugin. The exit status is 1 if
something is missing.
"""

import importlib.metadata
import importlib.util
import re
import resource
import subprocess
import sys
from pathlib import Path

PACKAGES = [
    "torch",
    "triton",
    "numpy",
    "pytest",
    "pytest-xdist",
    "hypothesis",
    "gguf",
    "pydantic",
    "rich",
    "typer",
    "safetensors",
]
TOOLS = ("cmake", "ninja", "g++")
INSTRUCTIONS = r"avx2|avx_vnni|avx512_bf16|avx512_vnni|avx512_vbmi|avx512_fp16|amx_\w+"
QUERY = "name,memory.total,driver_version,pcie.link.gen.max,pcie.link.width.max,compute_cap"


def said(*command: str) -> str:
    """Return what a command prints, or why it does not run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return (done.stdout + done.stderr).strip()


def describe() -> None:
    for line in said("lscpu").splitlines():
        if re.match(r"Model name|CPU\(s\)|Thread|Core|Socket|L3|NUMA", line):
            print(line)
    flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0]
    print("instructions:", *sorted(set(re.findall(rf"\b(?:{INSTRUCTIONS})\b", flags))))
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(("MemTotal", "HugePages_Total", "Hugepagesize")):
            print(line)
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    print("locked memory:", "unlimited" if limit == resource.RLIM_INFINITY else limit)
    print("kernel:", said("uname", "-r"))
    print(said("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv"))
    for file in Path("/sys/bus/pci/drivers/nvidia").glob("*/numa_node"):
        print("NUMA node of", file.parent.name, file.read_text().strip())


def missing() -> list[str]:
    """Return the names of packages and programs that are not there."""
    found = [
        name for name in PACKAGES if importlib.util.find_spec(name.removeprefix("pytest-")) is None
    ]
    for name in set(PACKAGES) - set(found):
        print(name, importlib.metadata.version(name))
    return found + [tool for tool in TOOLS if " not found" in said("bash", "-c", f"type {tool}")]


def check_vllm() -> str | None:
    """Return what is wrong with vLLM here, or None.

    An empty folder called vllm can be imported, too, so this looks for a file.
    """
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return "there is no vLLM"
    plugins = importlib.metadata.entry_points(group="vllm.general_plugins")
    if "lvllm" not in {plugin.name for plugin in plugins}:
        return f"vLLM in {spec.origin} has no entry point of LvLLM: {sorted(plugins)}"
    try:
        from vllm import LLM, __version__
        from vllm.model_executor.models.qwen3_moe import Qwen3MoeForCausalLM
        from vllm.v1.worker.gpu_worker import Worker
    except ImportError as error:
        return f"vLLM in {spec.origin} cannot be imported: {error}"
    print("vLLM", __version__, "from", spec.origin, "has", LLM, Qwen3MoeForCausalLM, Worker)
    return None


def main() -> None:
    if sys.argv[1:] == ["vllm"]:
        if wrong := check_vllm():
            raise SystemExit(wrong)
        return
    describe()
    if names := missing():
        raise SystemExit(f"missing: {', '.join(names)}")


if __name__ == "__main__":
    main()
