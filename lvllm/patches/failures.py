"""Errors that end in one line: of a process at the start, of a request, or of a server that stops.

What the lines say, and how they travel, is in `lvllm.faults`.
"""

import asyncio
import inspect
from typing import Any

from lvllm.patches.registry import patch

__all__ = [
    "answer_with_the_fault",
    "end_faulty_requests",
    "end_in_the_engines_line",
    "end_in_the_workers_line",
    "end_open_requests",
    "end_while_loading",
    "end_with_the_coordinator",
    "name_the_worker",
    "notice_a_death_soon",
    "say_who_died",
    "say_who_died_of_several",
]


@patch(
    "vllm.v1.engine.utils:wait_for_engine_startup",
    signature="(handshake_socket, core_engines, parallel_config, coordinated_dp, cache_config,"
    " launch)",
    why="vLLM's front process says of an engine that failed to start no more than that it did."
    " It ends in the line of the process that met the error instead, or in one that names the"
    " engine and the signal that has ended it.",
    upstream="none, because nothing was proposed yet; draft: docs/upstream/startup-errors.md",
    until="vLLM carries the text of an error at the start to its front process",
)
def end_in_the_engines_line(original: Any) -> Any:
    from lvllm.faults import shutdown as stopping
    from lvllm.faults.process import in_one_line, refusal

    wait = in_one_line(original)

    def wait_for_engine_startup(*arguments: Any, **options: Any) -> Any:
        try:
            return wait(*arguments, **options)
        except RuntimeError:
            launch = inspect.signature(original).bind(*arguments, **options).arguments["launch"]
            engines = getattr(launch.engine_manager, "processes", ())  # Ray's actors are none
            death = stopping.ended_by_a_signal(engines)
            if death is None:
                raise
            raise refusal(death) from None

    return wait_for_engine_startup


@patch(
    "vllm.v1.executor.multiproc_executor:WorkerProc.wait_for_ready",
    signature="(unready_proc_handles)",
    why="The engine's process prints a traceback when a worker fails to start. It leaves quietly"
    " instead, since the front process prints the worker's line, or one that names the worker and"
    " the signal that has ended it.",
    upstream="none, because nothing was proposed yet; draft: docs/upstream/startup-errors.md",
    until="vLLM carries the text of an error at the start to its front process",
)
def end_in_the_workers_line(original: Any) -> Any:
    from lvllm.faults import process
    from lvllm.faults import shutdown as stopping

    wait = process.in_one_line(original)

    def wait_for_ready(unready_proc_handles: Any) -> Any:
        try:
            return wait(unready_proc_handles)
        except Exception:
            death = stopping.ended_by_a_signal([handle.proc for handle in unready_proc_handles])
            if death is None:
                raise
            process.end(death)

    return wait_for_ready


@patch(
    "vllm.v1.executor.multiproc_executor:MultiprocExecutor.start_worker_monitor",
    signature="(self, inline=False)",
    why="A server whose worker was killed, by the system for want of memory, say, says only that"
    " its engine has failed. It names the worker and the signal. A headless node, which waits here"
    " for the end of its workers, stays when the first node has gone, and ends with status 0 when"
    " its own worker was killed. It ends with status 1 and a line that says why.",
    upstream="none, because nothing was proposed yet",
    until="vLLM carries the end of a worker to its front process, and that of a node to the others",
)
def name_the_worker(original: Any) -> Any:
    from lvllm.faults import first_node
    from lvllm.faults import shutdown as stopping

    def start_worker_monitor(self: Any, inline: bool = False) -> None:
        if inline:  # This is the front process of a headless node.
            processes = [worker.proc for worker in self.workers]
            parallel = self.parallel_config
            first_node.wait_for_an_end(processes, parallel.master_addr, parallel.master_port)
        stopping.report_a_death(self)
        original(self, inline)

    return start_worker_monitor


@patch(
    "vllm.v1.engine.core:EngineCoreProc.__init__",
    signature="(self, vllm_config, local_client, handshake_address, executor_class, log_stats,"
    " client_handshake_address=None, tensor_queue=None, *, engine_index=0)",
    why="An engine that gets SIGTERM while it loads a model ends once that is loaded, which may"
    " take minutes. It ends at once.",
    upstream="none, because nothing was proposed yet",
    until="vLLM's engine ends at once",
)
def end_while_loading(original: Any) -> Any:
    from lvllm.faults import shutdown as stopping

    def __init__(self: Any, *arguments: Any, **options: Any) -> None:
        with stopping.stopped_by_signals():
            original(self, *arguments, **options)

    return __init__


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


@patch(
    "vllm.v1.engine.async_llm:AsyncLLM.shutdown",
    signature="(self, timeout=None)",
    why="A server that gets SIGTERM ends its engine, and then waits for the answers that this"
    " engine was computing, until the last client gives up. The requests end with HTTP status"
    " 503.",
    upstream="none, because nothing was proposed yet",
    until="vLLM ends its open requests when it stops",
)
def end_open_requests(original: Any) -> Any:
    from lvllm.faults import shutdown as stopping

    def shutdown(self: Any, timeout: float | None = None) -> None:
        stopping.note_a_death(self)
        original(self, timeout)
        stopping.end_open_requests(self)

    return shutdown


@patch(
    "vllm.entrypoints.launchers.api_server.entry:run_server_worker",
    signature="(listen_address, sock, args, client_config=None, **uvicorn_kwargs)",
    why="A server whose engine was killed ends with status 0, which a supervisor takes for success."
    " A signal that comes while it starts may be lost, and the server goes on. A server that fails"
    " to start takes 2 s longer to end than it has to.",
    upstream="none, because nothing was proposed yet",
    until="vLLM ends with another status, and handles signals before it builds the engine",
)
def say_who_died(original: Any) -> Any:
    from vllm.v1.engine.exceptions import EngineDeadError

    from lvllm.faults import leaving
    from lvllm.faults import shutdown as stopping

    async def run_server_worker(
        listen_address: Any,
        sock: Any,
        args: Any,
        client_config: Any = None,
        **uvicorn_kwargs: Any,
    ) -> None:
        if client_config is None:  # Of several API servers, the process that started them decides.
            stopping.stop_at_once()
        try:
            await original(listen_address, sock, args, client_config, **uvicorn_kwargs)
        except EngineDeadError:
            if stopping.noted_death() is None:
                raise
        except (Exception, SystemExit):
            leaving.leave_with_the_error()
            raise
        if (death := stopping.noted_death()) is not None:
            leaving.end_in_a_line(f"lvllm: {death}")

    return run_server_worker


@patch(
    "vllm.entrypoints.cli.serve:wait_for_completion_or_failure",
    signature="(api_server_manager, engine_manager=None, coordinator=None)",
    why="With several API servers, which is the default with data parallelism, the process that"
    " started them prints a traceback when one of its processes has died. It names the process in"
    " one line instead, and ends the others at once.",
    upstream="none, because nothing was proposed yet",
    until="vLLM ends such a server in one line",
)
def say_who_died_of_several(original: Any) -> Any:
    from lvllm.faults import shutdown as stopping

    def wait_for_completion_or_failure(
        api_server_manager: Any, engine_manager: Any = None, coordinator: Any = None
    ) -> None:
        engines = getattr(engine_manager, "processes", None)
        if engines is None:  # Ray's actors are no processes of this host.
            original(api_server_manager, engine_manager, coordinator)
            return
        coordinators = [] if coordinator is None else [coordinator.proc]
        stopping.wait_for_a_death([*api_server_manager.processes, *engines, *coordinators])

    return wait_for_completion_or_failure


@patch(
    "vllm.v1.engine.core_client:MPClient.start_engine_core_monitor",
    signature="(self)",
    why="With one API server, nobody notices when the process that coordinates data-parallel"
    " replicas was killed, and replicas wait for it for ever. And a call to an engine that has"
    " ended meanwhile never returns: a server hangs whose engine dies late in its start, and so"
    " does `LLM.generate` whose engine is killed.",
    upstream="none, because nothing was proposed yet",
    until="vLLM watches its coordinator as it does its engines, and ends open calls with them",
)
def end_with_the_coordinator(original: Any) -> Any:
    from lvllm.faults import shutdown as stopping

    def start_engine_core_monitor(self: Any) -> None:
        original(self)
        stopping.end_with_the_coordinator(self)
        stopping.end_calls_with_the_engine(self)

    return start_engine_core_monitor


@patch(
    "vllm.entrypoints.launchers.launcher:watchdog_loop",
    signature="(server, engine)",
    why="A server without requests looks every 5 s whether its engine has died, and keeps its port"
    " meanwhile. It looks four times a second.",
    upstream="none, because nothing was proposed yet",
    until="vLLM's server ends when its client of the engine finds that dead",
)
def notice_a_death_soon(original: Any) -> Any:
    from vllm.entrypoints.launchers.launcher import terminate_if_errored

    async def watchdog_loop(server: Any, engine: Any) -> None:
        while True:
            await asyncio.sleep(0.25)
            terminate_if_errored(server, engine)

    return watchdog_loop
