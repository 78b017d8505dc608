"""What a stage of a pipeline receives, for the watchdog beside a GPU.

CUDA queues a step at once, and the stream then waits for the stage before, which may compute its
experts on the CPU for longer than a step may take.
"""

from typing import Any

from lvllm.patches.registry import IN_GPU_WORKER, patch

__all__ = ["mark_what_is_received"]


@patch(
    "vllm.v1.worker.gpu_worker:AsyncIntermediateTensors.wait_for_comm",
    signature="(self)",
    why="The watchdog counts the time of a step from when it is queued, or from the last thing that"
    " happened. It has to know where the stream waits for another stage, which may take any time.",
    upstream="none, because vLLM has no watchdog of the device's work",
    until="vLLM calls its worker between the receipt of a step's input and the step",
    platform="cuda",
    when=IN_GPU_WORKER,
)
def mark_what_is_received(original: Any) -> Any:
    def wait_for_comm(self: Any) -> None:
        from lvllm.gpu import mark_others

        waits = not self._comm_waited
        original(self)
        if waits:
            mark_others()

    return wait_for_comm
