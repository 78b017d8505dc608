"""The decoding engine's client of the prefill engine.

It is vLLM's own client of an engine, which starts the engine's process as the front process starts
the decoding engine's.
"""

import queue
from collections.abc import Iterator
from typing import Any

from lvllm.prefill.configuration import SPARE_BLOCKS, prefill_configuration
from lvllm.prefill.executors import EXECUTORS
from lvllm.prefill.memory import MemoryAddress

__all__ = ["Client"]


class Client:
    """The prefill engine, as the decoding engine's scheduler sees it.

    `process` is its process number. `blocks` is how many blocks of its cache prompts may take.
    """

    def __init__(self, vllm_config: Any, kv_cache_config: Any) -> None:
        """Start the engine, and wait until it takes requests."""
        from vllm.v1.engine.core_client import SyncMPClient

        config = prefill_configuration(vllm_config, kv_cache_config)
        executor = EXECUTORS[config.parallel_config.distributed_executor_backend]
        self._client = SyncMPClient(config, executor, log_stats=False)
        manager: Any = self._client.resources.engine_manager
        self.process = manager.processes[0].pid
        self.blocks = int(config.cache_config.num_gpu_blocks) - SPARE_BLOCKS
        self._failed = False

    @property
    def ended(self) -> bool:
        """Whether the engine has ended, or does not answer any more."""
        return self._failed or self._client.resources.engine_dead

    def send(self, name: str, request: Any, address: MemoryAddress) -> None:
        """Have all tokens that `request` has so far computed, under this name."""
        from vllm import SamplingParams
        from vllm.v1.engine import EngineCoreRequest

        sampling = SamplingParams(
            max_tokens=1,
            temperature=0,
            detokenize=False,
            extra_args={"kv_transfer_params": address.params()},
        )
        asked = EngineCoreRequest(
            request_id=name,
            prompt_token_ids=list(request.all_token_ids),
            mm_features=None,
            sampling_params=sampling,
            pooling_params=None,
            arrival_time=request.arrival_time,
            lora_request=None,
            cache_salt=request.cache_salt,
            data_parallel_rank=None,
            priority=request.priority,
        )
        self._call(self._client.add_request, asked)

    def abort(self, name: str) -> None:
        self._call(self._client.abort_requests, [name])

    def done(self, seconds: float = 0) -> Iterator[tuple[str, bool]]:
        """Names of requests that have ended, and whether all their tokens were computed.

        If none has ended yet, the call waits for one up to `seconds`.
        """
        from vllm.v1.engine import FinishReason

        while True:
            try:
                outputs = self._client.outputs_queue.get(seconds > 0, seconds)
            except queue.Empty:
                return
            seconds = 0
            if isinstance(outputs, Exception):
                self._failed = True
                return
            for output in outputs.outputs:
                if output.finish_reason is not None:
                    complete = output.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
                    yield output.request_id, complete

    def shutdown(self) -> None:
        # vLLM gives the decoding engine 5 s to end, and its own worker takes 3 of them.
        self._client.shutdown(timeout=1)

    def _call(self, function: Any, argument: Any) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            function(argument)
        except EngineDeadError:
            self._failed = True
