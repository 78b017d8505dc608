"""Names of vLLM's shared-memory segments, taken away as soon as nobody needs them to attach.

The queues between its processes, and on the CPU the buffers that ranks reduce in, lie in /dev/shm
under names that their processes remove when they end in order. Killed ones leave them behind:
160 to 240 MiB a queue. A segment without a name lives as long as a process has it mapped.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

__all__ = ["register"]

FOLDER = Path("/dev/shm")


def register() -> None:
    """Remove names once all processes are known to be attached."""
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

    ready = MessageQueue.wait_until_ready
    join = _CPUSHMDistributed._init_cpu_shm
    if ready.__module__ == __name__:
        return

    def wait_until_ready(self: Any) -> None:
        ready(self)
        # Who writes has now heard from all who read. Readers on other hosts have no buffer.
        buffer = getattr(self, "buffer", None)
        if self._is_writer and buffer is not None and buffer.is_creator:
            buffer.is_creator = False  # it would remove the name once more
            buffer.shared_memory.unlink()

    def init_cpu_shm(self: Any) -> int:
        handle = join(self)  # ends in a barrier: all ranks have joined
        for name in os.listdir(FOLDER):
            if name.startswith(f"{self.group_name}_"):
                with suppress(FileNotFoundError):  # each rank tries
                    os.unlink(FOLDER / name)
        return handle

    MessageQueue.wait_until_ready = wait_until_ready
    _CPUSHMDistributed._init_cpu_shm = init_cpu_shm  # type: ignore[method-assign]
