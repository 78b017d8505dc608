"""The connector in the decoding engine.

Long prompts go to the prefill engine, and their keys and values come back. vLLM's scheduler asks
for each waiting request how many of its tokens can be loaded from elsewhere. At the first such
question a long prompt is sent to the prefill engine, and while it is there the answer is "ask
again". Then a thread of the worker loads the keys and values while steps of other requests run.
Whatever goes wrong on the way, the answer becomes "none", and this engine prefills the prompt
itself.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum, auto
from itertools import count
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults

from lvllm.log import logger
from lvllm.machine import thread_pool
from lvllm.metrics.memory import Series, engine_name, open_block
from lvllm.prefill import client
from lvllm.prefill.caches import BlockCopy, BlockSize, CopyPlan, LayerCaches
from lvllm.prefill.memory import OwnedMemory
from lvllm.settings.configuration import HybridConfig
from lvllm.units import ceil_div

__all__ = ["SchedulerPart", "WorkerPart"]


PAUSE = 0.005
"""Seconds to wait for the prefill engine when this engine has nothing to compute. vLLM would ask
again after a millisecond, and on a CPU the time that asking takes is the prefill engine's.
"""


class Stage(Enum):
    """How far a prompt has come."""

    QUEUED = auto()
    PREFILLING = auto()
    READY = auto()
    LOADING = auto()
    LOCAL = auto()
    """Its blocks are loaded, or given up: this engine computes what is left."""


@dataclass(eq=False)
class Prompt:
    """The prompt of a request that the prefill engine computes, or has computed."""

    request: Any
    tokens: int
    stage: Stage = Stage.QUEUED
    sent_as: str = ""
    """The request's name in the prefill engine."""
    memory: OwnedMemory | None = None
    request_ended: bool = False
    """The request ended while the prompt was being loaded."""

    def release(self) -> None:
        self.stage = Stage.LOCAL
        if self.memory is not None:
            self.memory.close()
            self.memory = None


class _Counters:
    """What `/metrics` shows of the prompts that go to the prefill engine."""

    WAITING = (Stage.QUEUED, Stage.PREFILLING, Stage.READY, Stage.LOADING)
    RESULTS = ("sent", "loaded", "given_up")

    def __init__(self, vllm_config: Any) -> None:
        first = len(self.WAITING)
        series = [
            Series("lvllm_prefill_queue", {"stage": stage.name.lower()}, [place])
            for place, stage in enumerate(self.WAITING)
        ] + [
            Series("lvllm_prefill_prompts_total", {"result": result}, [place])
            for place, result in enumerate(self.RESULTS, first)
        ]
        size = first + len(self.RESULTS)
        self._numbers = open_block({"engine": engine_name(vllm_config)}, series, size)

    def add(self, result: str) -> None:
        """Count a prompt that had one of `RESULTS`."""
        if self._numbers is not None:
            self._numbers[len(self.WAITING) + self.RESULTS.index(result)] += 1

    def show(self, prompts: Iterable[Prompt]) -> None:
        """Note in which stages the prompts of now are."""
        if self._numbers is not None:
            stages = [prompt.stage for prompt in prompts]
            for place, stage in enumerate(self.WAITING):
                self._numbers[place] = stages.count(stage)


class SchedulerPart:
    """Starts the prefill engine and sends prompts to it."""

    def __init__(self, vllm_config: Any, kv_cache_config: Any) -> None:
        self._vllm_config, self._kv_cache_config = vllm_config, kv_cache_config
        self._block_size = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        self._min_tokens = vllm_config.kv_transfer_config.kv_connector_extra_config["min_tokens"]
        self._client: client.Client | None = None
        self._prompts: dict[str, Prompt] = {}
        self._queue: deque[Prompt] = deque()
        self._sent: dict[str, Prompt] = {}
        self._numbers = count()
        self._loads: list[BlockCopy] = []
        self._free = 0
        """Blocks of the prefill engine's cache that are not taken by prompts sent to it. Prompts
        wait for them, so the memory between the engines is at most as large as that cache, and the
        prefill engine never preempts a request.
        """
        self._counters = _Counters(vllm_config)

    def start(self, metadata: Mapping[int, BlockSize]) -> None:
        """Start the prefill engine. vLLM calls this when the worker has its caches."""
        (size,) = metadata.values()
        self._block_bytes = size.block_bytes
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
        """How many tokens of `request` can be loaded, beyond the `computed` ones that are here.

        None means that this is not known yet. The second value says whether the tokens are loaded
        while other requests are computed.
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
            self._counters.show(self._prompts.values())
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
            self._counters.add("given_up")
            self._finish(prompt)  # Other requests have computed the same tokens here meanwhile.
            return
        prompt.stage = Stage.LOADING
        address = prompt.memory.address
        first = (prompt.tokens - external) // self._block_size
        ids = blocks.get_block_ids()[0][first : address.blocks]
        self._loads.append(BlockCopy(request.request_id, address, first, tuple(ids)))

    def plan(self, scheduler_output: Any) -> CopyPlan:
        loads, self._loads = self._loads, []
        stages = {prompt.stage for prompt in self._prompts.values()}
        if (
            not scheduler_output.total_num_scheduled_tokens
            and Stage.PREFILLING in stages
            and not stages & {Stage.READY, Stage.LOADING}
        ):
            self._collect(PAUSE)
        self._counters.show(self._prompts.values())
        return CopyPlan(loads)

    def arrived(self, output: Any) -> None:
        """Take note of prompts that the worker has loaded, or failed to load."""
        for request in output.finished_recving or ():
            prompt = self._prompts[request]
            failed = request in output.failed_recving
            self._finish(prompt)
            self._counters.add("given_up" if failed else "loaded")
            if prompt.request_ended or not failed:
                # If the request is preempted later, it goes to the prefill engine again.
                del self._prompts[request]
        self._counters.show(self._prompts.values())

    def finished(self, request: Any) -> None:
        prompt = self._prompts.get(request.request_id)
        if prompt is None:
            return
        if prompt.stage is Stage.LOADING:
            prompt.request_ended = True  # The worker still reads the memory; `arrived` will follow.
            return
        if prompt.stage is Stage.QUEUED:
            self._queue.remove(prompt)
        if prompt.stage is Stage.PREFILLING and self._client is not None:
            self._client.abort(prompt.sent_as)
        if prompt.stage is not Stage.LOCAL:
            self._counters.add("given_up")
        self._finish(prompt)
        del self._prompts[request.request_id]
        self._counters.show(self._prompts.values())

    def shutdown(self) -> None:
        if self._client is not None:
            self._client.shutdown()
            self._client = None

    def _is_long(self, request: Any, computed: int) -> bool:
        """Whether the prefill engine is to compute the prompt of `request`.

        The prompt must be tokens alone, and nothing but its keys and values may be asked of it.
        """
        return (
            self._client is not None
            and request.num_tokens - computed >= self._min_tokens
            and request.pooling_params is None
            and request.prompt_embeds is None
            and request.lora_request is None
            and not request.mm_features
            and not request.resumable
            # vLLM sets this where the log-probabilities of the prompt are asked for.
            and not request.skip_reading_prefix_cache
        )

    def _send(self) -> None:
        """Send the first prompts of the queue, as long as there is room for the next one."""
        while self._queue and self._client is not None:
            prompt = self._queue[0]
            blocks = ceil_div(prompt.tokens, self._block_size)
            if blocks > self._free:
                return
            self._queue.popleft()
            self._free -= blocks
            prompt.memory = OwnedMemory(blocks, self._block_bytes)
            prompt.sent_as = f"{prompt.request.request_id}-{next(self._numbers)}"
            prompt.stage = Stage.PREFILLING
            self._sent[prompt.sent_as] = prompt
            self._client.send(prompt.sent_as, prompt.request, prompt.memory.address)
            self._counters.add("sent")

    def _finish(self, prompt: Prompt) -> None:
        """Free what a prompt takes up on its way, and send the next ones."""
        if prompt.memory is not None:
            self._free += prompt.memory.address.blocks
        prompt.release()
        self._sent.pop(prompt.sent_as, None)
        self._send()

    def _collect(self, seconds: float = 0) -> None:
        """Take note of what the prefill engine has done; wait up to `seconds` for something."""
        if self._client is None:
            return
        for name, complete in self._client.done(seconds):
            if prompt := self._sent.pop(name, None):
                if complete:
                    prompt.stage = Stage.READY
                else:
                    self._counters.add("given_up")
                    self._finish(prompt)
        if self._client.ended:
            logger.warning(
                "LvLLM: the prefill engine, process %d, has ended; from now on this one prefills"
                " long prompts, too",
                self._client.process,
            )
            client, self._client = self._client, None
            client.shutdown()
            for prompt in (*self._queue, *self._sent.values()):
                self._counters.add("given_up")
                prompt.release()
            self._queue.clear()
            self._sent.clear()


class WorkerPart:
    """Loads keys and values in a thread, while steps run."""

    def __init__(self, vllm_config: Any, kv_cache_config: Any) -> None:
        self._blocks = kv_cache_config.num_blocks
        (self._cpus,) = HybridConfig.carried(vllm_config).omp_cpus  # There is one worker.
        self._thread: ThreadPoolExecutor | None = None
        self._loading: dict[str, Future[None]] = {}

    def register(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        self._caches = LayerCaches(kv_caches, self._blocks)
        self._thread = thread_pool.pool(1, self._cpus)

    def handshake(self) -> BlockSize:
        return BlockSize(self._caches.block_bytes)

    def load(self, plan: CopyPlan) -> None:
        for copy in plan.copies:
            assert self._thread is not None, "vLLM registers the caches before the first step"
            self._loading[copy.request] = self._thread.submit(self._load, copy)

    def save(self, plan: CopyPlan) -> None:
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
        """May come before `register`: a worker that fails while it makes its caches ends so."""
        if self._thread is not None:
            self._thread.shutdown()

    @torch.inference_mode()
    def _load(self, copy: BlockCopy) -> None:
        memory = self._caches.open(copy.address)
        if self._caches.device.type == "cuda":
            # In the worker's own stream, the copies would wait for the steps that are queued there.
            with torch.cuda.stream(torch.cuda.Stream(self._caches.device)):
                self._caches.load(memory, copy)
        else:
            self._caches.load(memory, copy)
