"""Shared-memory segments that lose their names as soon as all processes have attached.

vLLM's queues between processes, and on the CPU the buffers in which ranks reduce, lie in /dev/shm
under names. Their processes remove the names when they end in order. Processes that are killed
leave 160 to 240 MiB a queue behind. A segment without a name lives as long as a process has it
mapped.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from lvllm.patches.registry import patch

__all__ = ["remove_group_names", "remove_queue_name"]

FOLDER = Path("/dev/shm")
UPSTREAM = (
    "none, because nothing was proposed for these;"
    " https://github.com/vllm-project/vllm/pull/51317 is about the same of KV offload"
)


@patch(
    "vllm.distributed.device_communicators.shm_broadcast:MessageQueue.wait_until_ready",
    signature="(self)",
    why="A killed process leaves the memory of its message queues behind in /dev/shm, 160 to"
    " 240 MiB each.",
    upstream=UPSTREAM,
    until="vLLM unlinks a queue's segment once all readers have attached",
)
def remove_queue_name(original: Any) -> Any:
    def wait_until_ready(self: Any) -> None:
        original(self)
        # The writer has now heard from all readers. Readers on other hosts have no buffer.
        buffer = getattr(self, "buffer", None)
        if self._is_writer and buffer is not None and buffer.is_creator:
            buffer.is_creator = False  # vLLM would remove the name once more
            buffer.shared_memory.unlink()

    return wait_until_ready


@patch(
    "vllm.distributed.device_communicators.cpu_communicator:_CPUSHMDistributed._init_cpu_shm",
    signature="(self)",
    why="A killed process leaves the buffers in which ranks on CPUs reduce behind in /dev/shm.",
    upstream=UPSTREAM,
    until="vLLM unlinks a group's segments once all ranks have joined",
)
def remove_group_names(original: Any) -> Any:
    def _init_cpu_shm(self: Any) -> int:
        handle: int = original(self)  # ends in a barrier, so all ranks have joined
        for name in os.listdir(FOLDER):
            if name.startswith(f"{self.group_name}_"):
                with suppress(FileNotFoundError):  # every rank tries
                    os.unlink(FOLDER / name)
        return handle

    return _init_cpu_shm
