"""How a request whose numbers went wrong ends: with an error that says where, and alone.

A worker sends what happened along with a step's output. The scheduler ends those requests as it
ends aborted ones, so that the tokens just sampled never leave; and in the front process the text
reaches the client as an HTTP error 500. vLLM has a finish reason for it ("error") but no text, and
no hook in the two places where one would be: they are wrapped here.
"""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from vllm.exceptions import GenerationError, GracefulHTTPError

from lvllm.log import logger

_FAULTS = "lvllm_faults"


class ExpertFault(GracefulHTTPError, GenerationError):
    """Ends one request. A GracefulHTTPError passes vLLM's generate() as it is, and answers that
    stream expect a GenerationError.
    """

    def __init__(self, message: str) -> None:
        GracefulHTTPError.__init__(self, message, HTTPStatus.INTERNAL_SERVER_ERROR)
        self.status_code = HTTPStatus.INTERNAL_SERVER_ERROR


def set_faults(output: Any, faults: Mapping[str, str]) -> None:
    """Attach to a step's output what happened to some of its requests, in one line each."""
    setattr(output, _FAULTS, dict(faults))


def register() -> None:
    """Let schedulers end faulty requests and front processes tell their clients why."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.output_processor import RequestState

    if Scheduler.update_from_output.__module__ == __name__:
        return
    update_from_output = Scheduler.update_from_output
    make_request_output = RequestState.make_request_output

    def update(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        ended = _end_requests(self, getattr(model_runner_output, _FAULTS, {}))
        outputs = update_from_output(self, scheduler_output, model_runner_output)
        _add_outputs(outputs, ended)
        return outputs

    def make(
        self: Any,
        new_token_ids: Any,
        pooling_output: Any,
        finish_reason: Any,
        stop_reason: Any,
        *arguments: Any,
        **more: Any,
    ) -> Any:
        # Nothing else of vLLM's gives an error a text.
        if str(finish_reason) == "error" and isinstance(stop_reason, str):
            if self.queue is not None:
                self.queue.put(ExpertFault(stop_reason))
                return None
            if pooling_output is not None:
                raise ExpertFault(stop_reason)  # LLM.embed's outputs have no place for a reason
        return make_request_output(
            self, new_token_ids, pooling_output, finish_reason, stop_reason, *arguments, **more
        )

    Scheduler.update_from_output = update  # type: ignore[method-assign]
    RequestState.make_request_output = make  # type: ignore[method-assign]


def _end_requests(scheduler: Any, faults: Mapping[str, str]) -> list[tuple[Any, str]]:
    """End these requests, each with its text."""
    from vllm.v1.request import RequestStatus

    ended = []
    for request_id, text in faults.items():
        request = scheduler.requests.get(request_id)
        if request is None or request.is_finished():
            continue
        # Later requests of the same beginning must not find these keys and values in the cache.
        for blocks in scheduler.kv_cache_manager.get_blocks(request_id).blocks:
            for block in blocks:
                pool = getattr(block, "pool", None) or scheduler.kv_cache_manager.block_pool
                pool.evict_blocks({block.block_id})
        logger.error("LvLLM: request %s ends with an error: %s", request_id, text)
        scheduler.finish_requests(request_id, RequestStatus.FINISHED_ERROR)
        ended.append((request, text))
    return ended


def _add_outputs(outputs: dict[int, Any], ended: list[tuple[Any, str]]) -> None:
    import torch
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs

    for request, text in ended:
        mine = outputs.setdefault(request.client_index, EngineCoreOutputs())
        mine.outputs.append(
            EngineCoreOutput(
                request_id=request.request_id,
                new_token_ids=[],
                finish_reason=request.get_finished_reason(),
                stop_reason=text,
                # Requests for embeddings must have an output, whatever became of them.
                pooling_output=torch.empty(0) if request.pooling_params else None,
                events=request.take_events(),
                trace_headers=request.trace_headers,
            )
        )
