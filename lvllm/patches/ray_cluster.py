"""Ray clusters of machines without GPUs, for which vLLM's CPU platform lacks its part.

vLLM's executor asks the platform for the resource by which Ray counts places for ranks, and then
asks Ray for the GPUs of each place.
"""

from importlib.util import find_spec
from typing import Any

from lvllm.patches.registry import ON_RAY, Unless, patch

__all__ = ["RANKS", "name_resource", "reduce_through_memory_of_one_host", "take_our_worker"]

RANKS = "lvllm"
"""The resource of a Ray node that says how many ranks it takes."""

UPSTREAM = (
    "https://github.com/vllm-project/vllm/issues/21602 and"
    " https://github.com/vllm-project/vllm/pull/25386 (both closed)"
)


@patch(
    "vllm.platforms.cpu:CpuPlatform.ray_device_key",
    signature="str",
    why="vLLM refuses Ray on platforms that name no resource for it. Ray's own CPUs would not do:"
    " vLLM packs ranks on as few nodes as have enough of the resource, and a node has many CPUs"
    " where it should take one rank.",
    upstream=UPSTREAM,
    until="vLLM's CPU platform supports Ray",
    platform="cpu",
)
def name_resource(original: Any) -> Any:
    return RANKS


@patch(
    "vllm.v1.executor.ray_executor_v2:RayWorkerProc",
    signature="type",
    why="vLLM asks Ray for a rank's GPUs, of which there are none, and copies the environment of"
    " the front process, whose CPUs and files another host does not have.",
    upstream=UPSTREAM,
    until="vLLM's CPU platform supports Ray",
    platform="cpu",
    when=ON_RAY,
    unless=Unless("Ray is not installed", lambda: find_spec("ray") is None),
)
def take_our_worker(original: Any) -> Any:
    from vllm.utils.import_utils import resolve_obj_by_qualname

    return resolve_obj_by_qualname("lvllm.worker.ray.HybridRayWorkerProc")


@patch(
    "vllm.distributed.device_communicators.cpu_communicator:"
    "CpuCommunicator._all_group_ranks_share_shm_group_name",
    signature="(self)",
    why="Ranks on CPUs reduce through shared memory if they agree on its name. The name is made of"
    " a port, on which the ranks of all hosts agree, and they wait for each other for ever.",
    upstream=UPSTREAM,
    until="CpuCommunicator looks whether the ranks of its group are on one host",
    platform="cpu",
)
def reduce_through_memory_of_one_host(original: Any) -> Any:
    def _all_group_ranks_share_shm_group_name(self: Any) -> bool:
        from vllm.distributed.parallel_state import in_the_same_node_as

        return bool(original(self)) and all(in_the_same_node_as(self.cpu_group))

    return _all_group_ranks_share_shm_group_name
