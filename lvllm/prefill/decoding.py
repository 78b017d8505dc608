"""In the decoding engine: long prompts go to the prefill engine, their keys and values come back.

The scheduler asks about each waiting request what of it can be had from elsewhere. That is where a
prompt is sent to the prefill engine, and while it is there the answer is "ask again". Then it is
loaded beside the steps of others, as vLLM's connectors do. Whatever goes wrong on the way, the
answer becomes "nothing", and this engine prefills the prompt itself.
"""

from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum, auto
from itertools import count
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults

from lvllm.log import logger
from lvllm.prefill import client
from lvllm.prefill.caches import Caches, Copies, Copy, Sizes
from lvllm.prefill.memory import Held, Memory
from lvllm.settings.configuration import HybridConfig
from lvllm.units import ceil_div

__all__ = ["Scheduler", "Worker"]


PAUSE = 0.005
"""Seconds to wait for the prefill engine where there is nothing else to do. vLLM would ask again
after a millisecond, and on a CPU that time is the prefill engine's.
"""


class Stage(Enum):
    """Where a prompt is."""

    QUEUED = auto()
    PREFILLING = auto()
    READY = auto()
    LOADING = auto()
    OURS = auto()
    """Loaded, or given up: the rest is this engine's."""


@dataclass(eq=False)
class Prompt:
    """A request that goes, or went, to the prefill engine."""

    request: Any
    tokens: int
    stage: Stage = Stage.QUEUED
    sent: str = ""
    """Its name there."""
    memory: Held | None = None
    ended: bool = False
    """Its request has, while it was being loaded."""

    def stop(self) -> None:
        self.stage = Stage.OURS
        if self.memory is not None:
            self.memory.close()
            self.memory = None


class Scheduler:
    """Sends prompts to the prefill engine, and starts that."""

    def __init__(self, vllm_config: Any, kv_cache_config: Any) -> None:
        self._vllm_config, self._kv_cache_config = vllm_config, kv_cache_config
        self._block_size = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        self._min_tokens = vllm_config.kv_transfer_config.kv_connector_extra_config["min_tokens"]
        self._client: client.Client | None = None
        self._prompts: dict[str, Prompt] = {}
        self._queue: deque[Prompt] = deque()
        self._sent: dict[str, Prompt] = {}
        self._numbers = count()
        self._loads: list[Copy] = []
        self._free = 0
        """Blocks of the prefill engine's cache that no prompt has which was sent there. So memory
        on the way is at most as large as that cache, and nothing there is preempted.
        """

    def start(self, metadata: Mapping[int, Sizes]) -> None:
        """Once the worker has its caches: the second engine."""
        (sizes,) = metadata.values()
        self._block_bytes = sizes.block_bytes
        self._client = client.Client(self._vllm_config, self._kv_cache_config)
        self._free = self._client.blocks
        logger.info(
            "LvLLM: prompts of %d tokens or more are prefilled by process %d",
            self._min_tokens,
            self._client.process,
        )

    def add(self, request: Any) -> None:
        pass

    def match(self, request: Any, computed: int) -> tuple[int | None, bool]:
        """Tokens of `request` that can be loaded, beyond the `computed` ones that are here, and
        whether beside other work. None: not known yet.
        """
        self._collect()
        prompt = self._prompts.get(request.request_id)
        if prompt is None:
            if not self._is_long(request, computed):
                return 0, False
            prompt = Prompt(request, request.num_tokens)
            self._prompts[request.request_id] = prompt
            self._queue.append(prompt)
            self._send()
        if prompt.stage in (Stage.QUEUED, Stage.PREFILLING):
            return None, False
        if prompt.stage is Stage.READY and prompt.tokens > computed:
            return prompt.tokens - computed, True
        return 0, False

    def allocated(self, request: Any, blocks: Any, external: int) -> None:
        prompt = self._prompts.get(request.request_id)
        if prompt is None or prompt.stage is not Stage.READY:
            return
        if not external or prompt.memory is None:
            self._end(prompt)  # other requests have computed it here meanwhile
            return
        prompt.stage = Stage.LOADING
        first = (prompt.tokens - external) // self._block_size
        ids = blocks.get_block_ids()[0][first : prompt.memory.place.blocks]
        self._loads.append(Copy(request.request_id, prompt.memory.place, first, tuple(ids)))

    def plan(self, scheduler_output: Any) -> Copies:
        loads, self._loads = self._loads, []
        stages = {prompt.stage for prompt in self._prompts.values()}
        if (
            not scheduler_output.total_num_scheduled_tokens
            and Stage.PREFILLING in stages
            and not stages & {Stage.READY, Stage.LOADING}
        ):
            self._collect(PAUSE)
        return Copies(loads)

    def arrived(self, output: Any) -> None:
        """Prompts that the worker has loaded, or could not."""
        for request in output.finished_recving or ():
            prompt = self._prompts[request]
            failed = request in output.failed_recving
            self._end(prompt)
            if prompt.ended or not failed:
                del self._prompts[request]  # preempted later, it goes to the prefill engine again

    def finished(self, request: Any) -> None:
        prompt = self._prompts.get(request.request_id)
        if prompt is None:
            return
        if prompt.stage is Stage.LOADING:
            prompt.ended = True  # the worker is at it, and will say so
            return
        if prompt.stage is Stage.QUEUED:
            self._queue.remove(prompt)
        if prompt.stage is Stage.PREFILLING and self._client is not None:
            self._client.abort(prompt.sent)
        self._end(prompt)
        del self._prompts[request.request_id]

    def shutdown(self) -> None:
        if self._client is not None:
            self._client.shutdown()
            self._client = None

    def _is_long(self, request: Any, computed: int) -> bool:
        """Whether the prefill engine is to have it: a prompt of tokens alone, of which nothing is
        asked but its keys and values.
        """
        return (
            self._client is not None
            and request.num_tokens - computed >= self._min_tokens
            and request.pooling_params is None
            and request.prompt_embeds is None
            and request.lora_request is None
            and not request.mm_features
            and not request.resumable
            and not request.skip_reading_prefix_cache  # as for log-probabilities of the prompt
        )

    def _blocks(self, prompt: Prompt) -> int:
        return ceil_div(prompt.tokens, self._block_size)

    def _send(self) -> None:
        """As many of the queue as have room, in their order."""
        while self._queue and self._client is not None:
            prompt = self._queue[0]
            if (blocks := self._blocks(prompt)) > self._free:
                return
            self._queue.popleft()
            self._free -= blocks
            prompt.memory = Held(blocks, self._block_bytes)
            prompt.sent = f"{prompt.request.request_id}-{next(self._numbers)}"
            prompt.stage = Stage.PREFILLING
            self._sent[prompt.sent] = prompt
            self._client.send(prompt.sent, prompt.request, prompt.memory.place)

    def _end(self, prompt: Prompt) -> None:
        """Of its way through the prefill engine."""
        if prompt.memory is not None:
            self._free += prompt.memory.place.blocks
        prompt.stop()
        self._sent.pop(prompt.sent, None)
        self._send()

    def _collect(self, seconds: float = 0) -> None:
        """What the prefill engine has done; waits so long for it to do something."""
        if self._client is None:
            return
        for name, whole in self._client.done(seconds):
            if prompt := self._sent.pop(name, None):
                if whole:
                    prompt.stage = Stage.READY
                else:
                    self._end(prompt)
        if self._client.ended:
            logger.warning(
                "LvLLM: the prefill engine, process %d, has ended; from now on this one prefills"
                " long prompts, too",
                self._client.process,
            )
            client, self._client = self._client, None
            client.shutdown()
            for prompt in (*self._queue, *self._sent.values()):
                prompt.stop()
            self._queue.clear()
            self._sent.clear()


class Worker:
    """Loads in a thread, beside the steps."""

    def __init__(self, vllm_config: Any, kv_cache_config: Any) -> None:
        self._blocks = kv_cache_config.num_blocks
        (self._cpus,) = HybridConfig.carried(vllm_config).omp_cpus  # there is one worker
        self._loading: dict[str, Future[None]] = {}

    def register(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        from lvllm.machine import thread_pool

        self._caches = Caches(kv_caches, self._blocks)
        self._thread: ThreadPoolExecutor = thread_pool.pool(1, self._cpus)

    def handshake(self) -> Sizes:
        return Sizes(self._caches.block_bytes)

    def load(self, wanted: Copies) -> None:
        for copy in wanted.copies:
            self._loading[copy.request] = self._thread.submit(self._load, copy)

    def save(self, wanted: Copies) -> None:
        pass

    def results(self, finished: set[str]) -> KVConnectorTransferResults:
        done = {request for request, future in self._loading.items() if future.done()}
        failed = set()
        for request in done:
            if error := self._loading.pop(request).exception():
                logger.warning("LvLLM: request %s is prefilled here: %s", request, error)
                failed.add(request)
        return KVConnectorTransferResults(finished_recving=done, failed_recving=failed)

    def shutdown(self) -> None:
        self._thread.shutdown()

    @torch.inference_mode()
    def _load(self, copy: Copy) -> None:
        memory: Memory = self._caches.open(copy.place)
        if self._caches.device.type == "cuda":
            # A stream of its own, or the copies would wait for the steps that are queued.
            with torch.cuda.stream(torch.cuda.Stream(self._caches.device)):
                self._caches.load(memory, copy)
        else:
            self._caches.load(memory, copy)
