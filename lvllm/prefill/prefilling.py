"""In the prefill engine: each step's new blocks of a prompt go to the memory that came with it."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults

from lvllm.prefill.caches import Caches, Copies, Copy
from lvllm.prefill.memory import Memory, Place
from lvllm.units import ceil_div

__all__ = ["PARAMS", "Scheduler", "Worker"]

PARAMS = "kv_transfer_params"
"""Of a request's extra arguments: vLLM's name."""


class Scheduler:
    """Knows which blocks a step completes."""

    def __init__(self, vllm_config: Any, kv_cache_config: Any) -> None:
        self._block_size = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        self._requests: dict[str, _Saved] = {}

    def start(self, metadata: Mapping[int, Any]) -> None:
        pass

    def add(self, request: Any) -> None:
        place = Place(**request.kv_transfer_params)
        self._requests[request.request_id] = _Saved(place, request.num_prompt_tokens)

    def match(self, request: Any, computed: int) -> tuple[int, bool]:
        return 0, False

    def allocated(self, request: Any, blocks: Any, external: int) -> None:
        pass

    def plan(self, scheduler_output: Any) -> Copies:
        cached = scheduler_output.scheduled_cached_reqs
        computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for new in scheduler_output.scheduled_new_reqs:
            computed[new.req_id] = new.num_computed_tokens
        copies = []
        for request, scheduled in scheduler_output.num_scheduled_tokens.items():
            saved = self._requests.get(request)
            if saved is None:
                continue
            first, last = saved.through(computed[request] + scheduled, self._block_size)
            if last > first:
                ids = scheduler_output.kv_connector_block_state.resolve_block_ids(request)[0]
                copies.append(Copy(request, saved.place, first, tuple(ids[first:last])))
        return Copies(copies)

    def arrived(self, output: Any) -> None:
        pass

    def finished(self, request: Any) -> None:
        self._requests.pop(request.request_id, None)

    def shutdown(self) -> None:
        pass


class _Saved:
    """How far a prompt of so many `tokens` is in its memory."""

    def __init__(self, place: Place, tokens: int) -> None:
        self.place = place
        self._tokens = tokens
        self._blocks = 0

    def through(self, computed: int, block_size: int) -> tuple[int, int]:
        """Blocks to save after a step that ends with so many tokens computed: whole ones, and the
        prompt's last. Preempted, it computes some anew: they are there already.
        """
        whole = computed >= self._tokens
        last = ceil_div(self._tokens, block_size) if whole else computed // block_size
        first, self._blocks = self._blocks, max(self._blocks, last)
        return first, self._blocks


class Worker:
    """Copies after each step."""

    def __init__(self, vllm_config: Any, kv_cache_config: Any) -> None:
        self._blocks = kv_cache_config.num_blocks
        self._open: dict[str, Memory] = {}

    def register(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        self._caches = Caches(kv_caches, self._blocks)

    def handshake(self) -> None:
        return None

    def load(self, wanted: Copies) -> None:
        pass

    def save(self, wanted: Copies) -> None:
        for copy in wanted.copies:
            # Gone with a request that ended meanwhile. Whoever loads sees what is not there.
            with suppress(FileNotFoundError):
                if copy.request not in self._open:
                    self._open[copy.request] = self._caches.open(copy.place)
                self._caches.save(self._open[copy.request], copy)

    def results(self, finished: set[str]) -> KVConnectorTransferResults:
        for request in finished:
            self._open.pop(request, None)
        return KVConnectorTransferResults()

    def shutdown(self) -> None:
        self._open.clear()
