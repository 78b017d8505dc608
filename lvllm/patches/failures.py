"""Errors that end in one line: of a process at the start, or of a single request.

What the lines say, and how they travel, is in `lvllm.faults.process` and `lvllm.faults.request`.
"""

from typing import Any

from lvllm.patches.registry import patch

__all__ = [
    "answer_with_the_fault",
    "end_faulty_requests",
    "end_in_the_engines_line",
    "end_in_the_workers_line",
]


@patch(
    "vllm.v1.engine.utils:wait_for_engine_startup",
    signature="(handshake_socket, core_engines, parallel_config, coordinated_dp, cache_config,"
    " launch)",
    also=(
        "(handshake_socket, addresses, core_engines, parallel_config, coordinated_dp,"
        " cache_config, proc_manager, coord_process)",
    ),
    why="vLLM's front process says of an engine that failed to start no more than that it did."
    " It ends in the line of the process that met the error instead.",
    upstream="none, because nothing was proposed yet; draft: docs/upstream/startup-errors.md",
    until="vLLM carries the text of an error at the start to its front process",
)
def end_in_the_engines_line(original: Any) -> Any:
    from lvllm.faults.process import in_one_line

    return in_one_line(original)


@patch(
    "vllm.v1.executor.multiproc_executor:WorkerProc.wait_for_ready",
    signature="(unready_proc_handles)",
    why="The engine's process prints a traceback when a worker fails to start. It leaves quietly"
    " instead, since the front process prints the worker's line.",
    upstream="none, because nothing was proposed yet; draft: docs/upstream/startup-errors.md",
    until="vLLM carries the text of an error at the start to its front process",
)
def end_in_the_workers_line(original: Any) -> Any:
    from lvllm.faults.process import in_one_line

    return in_one_line(original)


@patch(
    "vllm.v1.core.sched.scheduler:Scheduler.update_from_output",
    signature="(self, scheduler_output, model_runner_output)",
    why="A worker cannot tell the scheduler that the numbers of a single request went wrong. Such"
    " requests end with an error before the tokens just sampled are handed out.",
    upstream="https://github.com/vllm-project/vllm/pull/50283 (for NaN in logits); draft:"
    " docs/upstream/request-errors.md",
    until="ModelRunnerOutput has a field for the requests that failed, and why",
    platform="cpu",  # on a GPU vLLM's own worker runs, whose output tells of no faults
)
def end_faulty_requests(original: Any) -> Any:
    from lvllm.faults import request

    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        ended = request.end_requests(self, request.faults_of(model_runner_output))
        outputs = original(self, scheduler_output, model_runner_output)
        request.add_outputs(outputs, ended)
        return outputs

    return update_from_output


@patch(
    "vllm.v1.engine.output_processor:RequestState.make_request_output",
    signature="(self, new_token_ids, pooling_output, finish_reason, stop_reason,"
    " kv_transfer_params=None, ec_transfer_params=None, error=None)",
    also=(
        "(self, new_token_ids, pooling_output, finish_reason, stop_reason,"
        " kv_transfer_params=None, ec_transfer_params=None)",
    ),
    why="vLLM answers a request that ended with an error without saying what happened. The client"
    " gets HTTP status 500 and the line instead.",
    upstream="https://github.com/vllm-project/vllm/pull/50283 (for NaN in logits); draft:"
    " docs/upstream/request-errors.md",
    until="EngineCoreOutput carries a RequestError to the client",
    platform="cpu",
)
def answer_with_the_fault(original: Any) -> Any:
    from lvllm.faults import request

    def make_request_output(
        self: Any,
        new_token_ids: Any,
        pooling_output: Any,
        finish_reason: Any,
        stop_reason: Any,
        *arguments: Any,
        **options: Any,
    ) -> Any:
        fault = request.fault_of(finish_reason, stop_reason)
        if fault is not None and self.queue is not None:
            self.queue.put(fault)
            return None
        if fault is not None and pooling_output is not None:
            raise fault  # the outputs of LLM.embed have no place for a reason
        return original(
            self, new_token_ids, pooling_output, finish_reason, stop_reason, *arguments, **options
        )

    return make_request_output
