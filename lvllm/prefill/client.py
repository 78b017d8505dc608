"""The prefill engine's processes: how they are configured, started, asked and ended.

vLLM's own client of an engine starts it, as the front process starts the decoding one. It is a
child of the decoding engine, and ends with it.
"""

import copy
import os
import queue
import select
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from lvllm.prefill.memory import Place
from lvllm.units import ceil_div

__all__ = ["Client", "subordinate"]

# The process whose end is the prefill engine's, too.
_PARENT = "_LVLLM_PREFILL_PARENT"
NICE = 5
"""How much its threads step back behind the decoding engine's, which share CPUs with them and wait
for each other after every operation. On 2 cores, 2 requests decoding beside a prompt of 4096
tokens: at 0 a token takes 3.1 to 4.3 times as long, and the prompt as long as on one engine; at 5
2.1 to 2.7 and 1.0 to 1.6 times; at 10 1.65 and 1.33 times.
"""
_RESERVE = 4
"""Blocks of its cache beyond a prompt of the largest size: vLLM's null block, and what a scheduler
that runs ahead takes.
"""


class Client:
    """Starts the engine, and returns when it can be asked.

    `blocks` are those of its cache, `process` is its number, `ended` whether it has.
    """

    def __init__(self, vllm_config: Any, kv_cache_config: Any) -> None:
        from vllm.utils.system_utils import set_env_var
        from vllm.v1.engine.core_client import SyncMPClient
        from vllm.v1.executor import Executor

        config = _configured(vllm_config, kv_cache_config)
        gpu = vllm_config.kv_transfer_config.kv_connector_extra_config["gpu"]
        with ExitStack() as environment:  # of the processes that are started meanwhile
            environment.enter_context(set_env_var(_PARENT, str(os.getpid())))
            if gpu is not None:
                environment.enter_context(set_env_var("CUDA_VISIBLE_DEVICES", str(gpu)))
            self._client = SyncMPClient(config, Executor.get_class(config), log_stats=False)
        manager: Any = self._client.resources.engine_manager
        self.process = manager.processes[0].pid
        self.blocks = int(config.cache_config.num_gpu_blocks) - _RESERVE
        self._failed = False

    @property
    def ended(self) -> bool:
        return self._failed or self._client.resources.engine_dead

    def send(self, name: str, request: Any, place: Place) -> None:
        """Have the tokens of a `request` computed, as far as it has them, under this name."""
        from vllm import SamplingParams
        from vllm.v1.engine import EngineCoreRequest

        sampling = SamplingParams(
            max_tokens=1,
            temperature=0,
            detokenize=False,
            extra_args={"kv_transfer_params": place.params()},
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
        """Requests that have ended, and whether with all their tokens computed. Where there is none
        yet, one is waited for so many `seconds`.
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
                    whole = output.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
                    yield output.request_id, whole

    def shutdown(self) -> None:
        self._client.shutdown(timeout=1)  # vLLM gives us 5 s, and our worker takes 3

    def _call(self, function: Any, argument: Any) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            function(argument)
        except EngineDeadError:
            self._failed = True


def subordinate() -> None:
    """In a process of the prefill engine: step back behind the decoding one, and end with it,
    however that ends.
    """
    parent = os.environ.get(_PARENT)
    if parent is None or any(thread.name == _PARENT for thread in threading.enumerate()):
        return
    try:
        descriptor = os.pidfd_open(int(parent))
        priority = os.getpriority(os.PRIO_PROCESS, int(parent))
    except ProcessLookupError:
        os._exit(1)
    # This thread's, and that of all that it will start.
    os.setpriority(os.PRIO_PROCESS, 0, priority + NICE)

    def wait() -> None:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        poll.poll()
        os._exit(1)

    threading.Thread(target=wait, name=_PARENT, daemon=True).start()


def _configured(vllm_config: Any, kv_cache_config: Any) -> Any:
    """The prefill engine's configuration: the decoding one's, but for what follows."""
    from vllm.config import CUDAGraphMode, KVTransferConfig
    from vllm.utils import random_uuid

    from lvllm.settings.configuration import RESOLVED

    # Its own parts are what may be changed; layers that are built by now are none of them.
    config = copy.copy(vllm_config)
    config.compilation_config = copy.copy(config.compilation_config)
    config.compilation_config.static_forward_context = {}
    config.compilation_config.static_all_moe_layers = []
    config = copy.deepcopy(config)
    ours = config.kv_transfer_config
    config.instance_id = random_uuid()[:5]
    config.additional_config[RESOLVED] = ours.kv_connector_extra_config["prefill"]
    config.kv_transfer_config = KVTransferConfig(
        kv_connector=ours.kv_connector,
        kv_connector_module_path=ours.kv_connector_module_path,
        kv_role="kv_producer",
    )
    config.speculative_config = config.lora_config = config.kv_events_config = None
    config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE  # those are for decoding
    group = kv_cache_config.kv_cache_groups[0].kv_cache_spec
    blocks = ceil_div(config.model_config.max_model_len, group.block_size) + _RESERVE
    size = kv_cache_config.kv_cache_tensors[0].size // kv_cache_config.num_blocks
    config.cache_config.kv_cache_memory_bytes = blocks * size
    config.cache_config.num_gpu_blocks = None
    config.cache_config.num_gpu_blocks_override = None
    return config
