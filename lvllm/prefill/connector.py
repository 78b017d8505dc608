"""The KV connector that both engines load.

vLLM makes a connector in four places: in the scheduler and in the worker of each engine. Ours
passes vLLM's calls on to one class for each place.
"""

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from lvllm.prefill import decode_side, prefill_side

__all__ = ["PrefillConnector"]


class PrefillConnector(KVConnectorBase_V1):
    """Which class answers depends on the engine and on the process.

    The prefill engine has vLLM's role kv_producer, the decoding engine kv_consumer.
    """

    _cache_hit_source = CacheHitSource.HOST

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        side = prefill_side if vllm_config.kv_transfer_config.is_kv_producer else decode_side
        part = side.SchedulerPart if role == KVConnectorRole.SCHEDULER else side.WorkerPart
        self._part: Any = part(vllm_config, kv_cache_config)

    @property
    def requires_kv_delivery(self) -> bool:
        """False: a prompt's blocks are saved in the step that computes them."""
        return False

    # vLLM calls these in workers.

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        self._part.register(kv_caches)

    def get_handshake_metadata(self) -> Any:
        return self._part.handshake()

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self._part.load(self._get_connector_metadata())

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None:
        pass

    def wait_for_save(self) -> None:
        self._part.save(self._get_connector_metadata())

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        return self._part.results(finished_req_ids)

    # vLLM calls these in schedulers.

    def set_xfer_handshake_metadata(self, metadata: dict[int, Any]) -> None:
        self._part.start(metadata)

    def on_new_request(self, request: Any) -> None:
        self._part.add(request)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        return self._part.match(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self._part.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        return self._part.plan(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        self._part.arrived(connector_output)

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        self._part.finished(request)
        return False, None

    # vLLM calls this in both, also where starting an engine has failed halfway.

    def shutdown(self) -> None:
        self._part.shutdown()
