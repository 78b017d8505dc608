"""How fast pinned memory is copied to a GPU, alone and while the CPUs read memory."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from lvllm.machine.facts import gpu as gpu_facts
from lvllm.machine.facts.commands import Run
from lvllm.machine.measure.reading import Reader
from lvllm.machine.report import Copy, Gpu

__all__ = ["measure"]

COPY_BYTES = 256 << 20
SECONDS = 0.3


def measure(reader: Reader, gpus: Sequence[Gpu], run: Run) -> list[Copy]:
    """The copies to each of `gpus` that PyTorch may use.

    Raises RuntimeError if PyTorch cannot use any GPU, or CUDA refuses.
    """
    if not torch.cuda.is_available():
        raise RuntimeError(f"PyTorch {torch.__version__} sees no GPU")
    # The driver writes GPU-<uuid>.
    devices = {
        f"GPU-{torch.cuda.get_device_properties(device).uuid}": device
        for device in range(torch.cuda.device_count())
    }
    host = torch.ones(COPY_BYTES, dtype=torch.uint8).pin_memory()
    found = []
    for gpu in gpus:
        device = devices.get(gpu.uuid or "")
        if device is not None and gpu.index is not None:  # CUDA_VISIBLE_DEVICES may hide some.
            found.append(_copies(reader, host, device, gpu.index, run))
    return found


def _copies(reader: Reader, host: torch.Tensor, device: int, index: int, run: Run) -> Copy:
    target = torch.empty_like(host, device=torch.device("cuda", device))

    def rate(go_on: Callable[[float], bool]) -> float:
        torch.cuda.synchronize(device)
        begin, copies = time.perf_counter(), 0
        while go_on(time.perf_counter() - begin):
            target.copy_(host, non_blocking=True)
            torch.cuda.synchronize(device)
            copies += 1
        return copies * COPY_BYTES / (time.perf_counter() - begin)

    rate(lambda took: took < SECONDS / 3)  # Wakes up the link.
    alone = rate(lambda took: took < SECONDS)
    with ThreadPoolExecutor(1) as beside:
        reading = beside.submit(reader.local_rate, SECONDS)
        both = rate(lambda took: took < SECONDS)
        read = reading.result()
        # The link of an idle GPU runs at a lower generation, so it is asked for during copies.
        asking = beside.submit(gpu_facts.pcie_generation, run, index)
        rate(lambda took: not asking.done())
        generation = asking.result()
    return Copy(
        gpu_index=index,
        copy_gb_per_s=alone / 1e9,
        copy_beside_reads_gb_per_s=both / 1e9,
        reads_beside_copy_gb_per_s=read / 1e9,
        pcie_generation_in_use=generation,
    )
