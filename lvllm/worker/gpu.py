"""vLLM's GPU worker, which ends a step with an error that one of lk's callbacks met in it."""

from typing import Any

from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.gpu_worker import Worker

from lvllm.gpu import offload

__all__ = ["HybridGPUWorker"]


class HybridGPUWorker(Worker):
    """A callback may raise nothing, and the replay of a graph runs no Python: what went wrong in a
    step is known when its output is there, for which the host waits anyway.

    Raises RuntimeError, which ends the engine.
    """

    def determine_available_memory(self) -> int:
        with offload.concentrated_routing():
            return int(super().determine_available_memory())

    def execute_model(self, scheduler_output: Any) -> Any:
        output = super().execute_model(scheduler_output)
        offload.watch_step()
        return _checked(output)

    def sample_tokens(self, grammar_output: Any) -> Any:
        return _checked(super().sample_tokens(grammar_output))


def _checked(output: Any) -> Any:
    if isinstance(output, AsyncModelRunnerOutput):
        return _CheckedOutput(output)
    if isinstance(output, ModelRunnerOutput):
        offload.check()
    return output


class _CheckedOutput(AsyncModelRunnerOutput):
    """An output that is waited for later, maybe in another thread."""

    def __init__(self, output: AsyncModelRunnerOutput) -> None:
        self._output = output

    def get_output(self) -> ModelRunnerOutput:
        output = self._output.get_output()
        offload.check()
        return output
