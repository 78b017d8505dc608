"""The connector in the prefill engine.

After each step, the blocks that the step completed are copied to the memory whose address came with
the request.
"""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults

from lvllm.prefill.caches import BlockCopy, CopyPlan, LayerCaches
from lvllm.prefill.memory import MappedMemory, MemoryAddress
from lvllm.units import ceil_div

__all__ = ["SchedulerPart", "WorkerPart"]


class SchedulerPart:
    """Works out which blocks each step completes."""

    def __init__(self, vllm_config: Any, kv_cache_config: Any) -> None:
        self._block_size = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        self._requests: dict[str, _Progress] = {}

    def start(self, metadata: Mapping[int, Any]) -> None:
        pass

    def add(self, request: Any) -> None:
        address = MemoryAddress(**request.kv_transfer_params)
        self._requests[request.request_id] = _Progress(address, request.num_prompt_tokens)

    def match(self, request: Any, computed: int) -> tuple[int, bool]:
        return 0, False

    def allocated(self, request: Any, blocks: Any, external: int) -> None:
        pass

    def plan(self, scheduler_output: Any) -> CopyPlan:
        cached = scheduler_output.scheduled_cached_reqs
        computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for new in scheduler_output.scheduled_new_reqs:
            computed[new.req_id] = new.num_computed_tokens
        copies = []
        for request, scheduled in scheduler_output.num_scheduled_tokens.items():
            progress = self._requests.get(request)
            if progress is None:
                continue
            first, last = progress.advance(computed[request] + scheduled, self._block_size)
            if last > first:
                ids = scheduler_output.kv_connector_block_state.resolve_block_ids(request)[0]
                copies.append(BlockCopy(request, progress.address, first, tuple(ids[first:last])))
        return CopyPlan(copies)

    def arrived(self, output: Any) -> None:
        pass

    def finished(self, request: Any) -> None:
        self._requests.pop(request.request_id, None)

    def shutdown(self) -> None:
        pass


class _Progress:
    """How many blocks of a prompt of `tokens` tokens are saved."""

    def __init__(self, address: MemoryAddress, tokens: int) -> None:
        self.address = address
        self._tokens = tokens
        self._blocks = 0

    def advance(self, computed: int, block_size: int) -> tuple[int, int]:
        """The range of blocks to save after a step that ends with `computed` tokens computed.

        Only full blocks are saved, and the prompt's last one. A request that was preempted computes
        some blocks again; they are saved already.
        """
        complete = computed >= self._tokens
        last = ceil_div(self._tokens, block_size) if complete else computed // block_size
        first, self._blocks = self._blocks, max(self._blocks, last)
        return first, self._blocks


class WorkerPart:
    """Copies the blocks after each step."""

    def __init__(self, vllm_config: Any, kv_cache_config: Any) -> None:
        self._blocks = kv_cache_config.num_blocks
        self._open: dict[str, MappedMemory] = {}

    def register(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        self._caches = LayerCaches(kv_caches, self._blocks)

    def handshake(self) -> None:
        return None

    def load(self, plan: CopyPlan) -> None:
        pass

    def save(self, plan: CopyPlan) -> None:
        for copy in plan.copies:
            # The memory is gone if its request has ended meanwhile. Whoever loads from it looks at
            # the count, so blocks that are missing there do no harm.
            with suppress(FileNotFoundError):
                if copy.request not in self._open:
                    self._open[copy.request] = self._caches.open(copy.address)
                self._caches.save(self._open[copy.request], copy)

    def results(self, finished: set[str]) -> KVConnectorTransferResults:
        for request in finished:
            self._open.pop(request, None)
        return KVConnectorTransferResults()

    def shutdown(self) -> None:
        self._open.clear()
