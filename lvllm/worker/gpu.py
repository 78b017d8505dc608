"""vLLM's GPU worker, which ends a step with an error that a host call met in that step."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.gpu_worker import Worker

from lvllm.errors import LvllmError
from lvllm.faults import leaving, process
from lvllm.gpu import concentrated_routing, mark_others, mark_step, raise_host_call_error
from lvllm.log import logger
from lvllm.moe.arrivals import NOT_AGAIN
from lvllm.patches import PatchError, install
from lvllm.patches.registry import IN_GPU_WORKER
from lvllm.worker import expert_cache, experts, verification
from lvllm.worker.counting import Steps, count_worker

__all__ = ["HybridGPUWorker"]


class HybridGPUWorker(Worker):
    """A GPU worker that checks for errors of lk when a step's output is there.

    A host call cannot raise, and the replay of a graph runs no Python. The host waits for a step's
    output anyway, and by then all host calls of the step have ended.

    Raises RuntimeError, which ends the engine. vLLM takes the output, or the exception, of one rank
    alone: it only logs the exceptions of all others, which leaves the first one waiting for them.
    So any other rank ends its process, and looks for host calls' errors when its next step begins.
    """

    _steps = Steps(None)

    def load_model(self, **arguments: Any) -> None:
        """Load the model, and verify its layers if LVLLM_VERIFY says so."""
        try:
            install("cuda", IN_GPU_WORKER)
        except PatchError as error:
            process.end(str(error))
        super().load_model(**arguments)
        experts.warn_if_none_are_ours(self.vllm_config, self.model_runner.get_model())
        verification.at_start(self.vllm_config, self.model_runner.get_model())

    def compile_or_warm_up_model(self) -> Any:
        """Warm the model up, and count from then on."""
        times = super().compile_or_warm_up_model()
        self._steps = count_worker(self)
        return times

    def shutdown(self) -> None:
        leaving.collect_nothing_more()
        expert_cache.save()
        super().shutdown()

    def reload_weights(self, *_: Any, **__: Any) -> None:
        """Refuse what vLLM's workers can do."""
        raise LvllmError(NOT_AGAIN)

    def verify_experts(self) -> list[str]:
        """See `lvllm verify`."""
        return verification.verify_experts(self.vllm_config, self.model_runner.get_model())

    def determine_available_memory(self) -> int:
        """Measure memory with the routing that takes the most of it."""
        with concentrated_routing():
            available = int(super().determine_available_memory())
        return expert_cache.leave_room(self, available)

    def execute_model(self, scheduler_output: Any) -> Any:
        """Run a step, which is due from now on for the watchdog."""
        with self._ended_by_errors():
            self._steps.add(scheduler_output)
            self._wait_for_sends()
            output = super().execute_model(scheduler_output)
            mark_step()
            return _checked(output)

    @contextmanager
    def _ended_by_errors(self) -> Iterator[None]:
        """End the process for an error, unless vLLM hears of this rank's."""
        parallel = self.parallel_config
        of_last_stage = parallel.tensor_parallel_size * parallel.prefill_context_parallel_size
        if self.rank == parallel.world_size - of_last_stage:
            yield
            return
        try:
            raise_host_call_error()
            yield
        except Exception as error:
            logger.exception("LvLLM: rank %d ends", self.rank)
            process.end_now(f"rank {self.rank}: {error}")

    def _wait_for_sends(self) -> None:
        """Wait for the last step's sends to the next stage of a pipeline, as vLLM would do next.

        They begin when that stage is done with the step before.
        """
        sends: list[Any] = getattr(self, "_pp_send_work", [])
        for handle in sends:
            handle.wait()
        if sends:
            sends.clear()
            mark_others()

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sample the tokens of a step."""
        with self._ended_by_errors():
            return _checked(super().sample_tokens(grammar_output))


def _checked(output: Any) -> Any:
    """Check for errors now if the output is there, or else when it is waited for."""
    if isinstance(output, AsyncModelRunnerOutput):
        return _CheckedOutput(output)
    if isinstance(output, ModelRunnerOutput):
        raise_host_call_error()
    return output


class _CheckedOutput(AsyncModelRunnerOutput):
    """An output that is waited for later, possibly in another thread."""

    def __init__(self, output: AsyncModelRunnerOutput) -> None:
        self._output = output

    def get_output(self) -> ModelRunnerOutput:
        output = self._output.get_output()
        raise_host_call_error()
        return output
