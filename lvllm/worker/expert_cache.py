"""What a worker does for the cache of experts: it opens the cache, and saves its counts at the end.

The size of the cache may follow from the memory that the KV cache does not need.
"""

from typing import Any

from lvllm.gpu import caches, waiting_for_cache
from lvllm.gpu.cache.products import SCRATCH_BYTES
from lvllm.log import logger
from lvllm.units import amount

__all__ = ["REQUESTS", "SHARE", "leave_room", "save"]

REQUESTS = 2
"""The KV cache holds at least so many requests of max-model-len."""
SHARE = 4
"""The KV cache keeps at least one part in so many. More KV cache lets more requests run at a time,
and each of them makes the experts that are read more alike, so that a cache saves less."""
SCRATCH = 2 * SCRATCH_BYTES
"""What the products of the cache's experts take, in graphs and outside of them."""


def leave_room(worker: Any, available: int) -> int:
    """Open the cache with LVLLM_GPU_EXPERT_CACHE=auto, if it has yet to be opened.

    Args:
        worker: vLLM's worker.
        available: the bytes that vLLM has measured for its KV cache.

    Returns:
        The bytes that are left for the KV cache.
    """
    waiting = waiting_for_cache()
    if not waiting:
        return available
    specs = worker.get_kv_cache_spec().values()
    requests = REQUESTS * sum(spec.max_memory_usage_bytes(worker.vllm_config) for spec in specs)
    kept = max(requests, available // SHARE)
    size = available - kept - SCRATCH
    said = f"LvLLM: LVLLM_GPU_EXPERT_CACHE=auto: of {amount(available)} the KV cache keeps"
    try:
        waiting[0].open_cache(max(size, 0))
    except ValueError:
        logger.warning("%s %s, so no expert has room", said, amount(available))
        return available
    left = available - sum(cache.nbytes for cache in waiting[0].caches) - SCRATCH
    logger.info("%s %s", said, amount(left))
    return left


def save() -> None:
    """Save how often experts were read, so that a short run is known to the next one, too."""
    for cache in caches():
        cache.save()
