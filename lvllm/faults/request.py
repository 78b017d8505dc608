"""How one request ends whose numbers went wrong: with an error that says where.

A worker sends what happened along with a step's output. The scheduler ends those requests as it
ends aborted ones, so that the tokens just sampled never leave. The front process then answers the
client with the text, as HTTP status 500. vLLM has a finish reason for this ("error") but no text
and no hook, so `lvllm.patches.failures` calls this module from the two places where it is needed.
"""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from vllm.exceptions import GenerationError, GracefulHTTPError

from lvllm.log import logger
from lvllm.metrics.memory import Numbers, Series, engine_name, open_block

__all__ = ["ExpertFault", "add_outputs", "end_requests", "fault_of", "faults_of", "set_faults"]

_FAULTS = "lvllm_faults"
_STOPS = "lvllm_nan_stops"


class ExpertFault(GracefulHTTPError, GenerationError):
    """The error that ends one request.

    vLLM's generate() lets a GracefulHTTPError pass, and its streamed answers expect a
    GenerationError, so this is both.
    """

    def __init__(self, message: str) -> None:
        GracefulHTTPError.__init__(self, message, HTTPStatus.INTERNAL_SERVER_ERROR)
        self.status_code = HTTPStatus.INTERNAL_SERVER_ERROR


def set_faults(output: Any, faults: Mapping[str, str]) -> None:
    """Attach to a step's output one line for each of its requests that went wrong."""
    setattr(output, _FAULTS, dict(faults))


def faults_of(output: Any) -> Mapping[str, str]:
    """Return what `set_faults` attached, by the id of the request; most outputs have nothing."""
    faults: Mapping[str, str] = getattr(output, _FAULTS, {})
    return faults


def end_requests(scheduler: Any, faults: Mapping[str, str]) -> list[tuple[Any, str]]:
    """End these requests in vLLM's scheduler, and return each with its line."""
    from vllm.v1.request import RequestStatus

    stops = _stops(scheduler)
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
        if stops is not None:
            stops[0] += 1
    return ended


def _stops(scheduler: Any) -> Numbers | None:
    """The number of requests that ended so, which `/metrics` shows from the first step on."""
    if not hasattr(scheduler, _STOPS):
        labels = {"engine": engine_name(scheduler.vllm_config)}
        series = Series("lvllm_nan_stops_total", {}, [0])
        setattr(scheduler, _STOPS, open_block(labels, [series], 1))
    found: Numbers | None = getattr(scheduler, _STOPS)
    return found


def add_outputs(outputs: dict[int, Any], ended: list[tuple[Any, str]]) -> None:
    """Add to a step's outputs, by client, one for each request that `end_requests` ended."""
    import torch
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs

    for request, text in ended:
        client = outputs.setdefault(request.client_index, EngineCoreOutputs())
        client.outputs.append(
            EngineCoreOutput(
                request_id=request.request_id,
                new_token_ids=[],
                finish_reason=request.get_finished_reason(),
                stop_reason=text,
                # A request for embeddings must have an output, whatever became of it.
                pooling_output=torch.empty(0) if request.pooling_params else None,
                events=request.take_events(),
                trace_headers=request.trace_headers,
            )
        )


def fault_of(finish_reason: Any, stop_reason: Any) -> ExpertFault | None:
    """Return the error of a request that ended so, or None.

    Only `add_outputs` gives a text to a request that ends with an error.
    """
    if str(finish_reason) == "error" and isinstance(stop_reason, str):
        return ExpertFault(stop_reason)
    return None
