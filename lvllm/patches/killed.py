"""What vLLM's processes leave behind when one of them is killed."""

import os
from typing import Any

from lvllm.patches.registry import patch

__all__ = [
    "end_the_coordinator",
    "end_the_engine",
    "end_while_importing",
    "end_workers_that_wait",
    "several_ranks_meet",
    "single_rank_meets",
]

LEFT_BEHIND = "The file by which ranks find each other stays in /tmp if their process is killed."
UPSTREAM = "none, because nothing was proposed yet"
OWN_FOLDER = "vLLM makes such files in a folder that it removes"


def _in_the_servers_folder(original: Any) -> Any:
    from lvllm.faults import scratch

    def get_file_store_init_method() -> str:
        return scratch.file_store() or original()

    return get_file_store_init_method


@patch(
    "vllm.v1.executor.uniproc_executor:get_file_store_init_method",
    signature="()",
    why=LEFT_BEHIND,
    upstream=UPSTREAM,
    until=OWN_FOLDER,
)
def single_rank_meets(original: Any) -> Any:
    return _in_the_servers_folder(original)


@patch(
    "vllm.v1.executor.multiproc_executor:get_file_store_init_method",
    signature="()",
    why=LEFT_BEHIND,
    upstream=UPSTREAM,
    until=OWN_FOLDER,
)
def several_ranks_meet(original: Any) -> Any:
    return _in_the_servers_folder(original)


@patch(
    "vllm.v1.engine.coordinator:DPCoordinatorProc.run_coordinator",
    signature="(engine_count, front_publish_address, back_output_address, back_publish_address,"
    " zmq_addr_pipe=None, min_stats_update_interval_ms=100, enable_wave_coordination=True,"
    " logging_config=None)",
    why="The process that coordinates data-parallel replicas runs for ever once the front process"
    " was killed. It loads no plugins, in which the other processes learn to end.",
    upstream=UPSTREAM,
    until="vLLM's processes end with their parent",
)
def end_the_coordinator(original: Any) -> Any:
    from lvllm.faults.orphans import GuardedTarget

    return GuardedTarget(_run_coordinator, original)


def _run_coordinator() -> Any:
    from vllm.v1.engine.coordinator import DPCoordinatorProc

    return DPCoordinatorProc.run_coordinator


@patch(
    "vllm.v1.engine.core:EngineCoreProc.run_engine_core",
    signature="(*args, dp_rank=0, local_dp_rank=0, **kwargs)",
    why="An engine loads the plugins, in which it learns to end, after the front process has"
    " answered its first message. It waits for that answer for 5 minutes, also where the front"
    " process has ended.",
    upstream=UPSTREAM,
    until="vLLM's processes end with their parent",
)
def end_the_engine(original: Any) -> Any:
    from lvllm.faults.orphans import GuardedTarget

    return GuardedTarget(_run_engine, original)


def _run_engine() -> Any:
    from vllm.plugins import load_general_plugins
    from vllm.v1.engine.core import EngineCoreProc

    load_general_plugins()  # An engine's constructor does so, which is too late to replace that.
    return EngineCoreProc.run_engine_core


@patch(
    "multiprocessing.spawn:get_preparation_data",
    signature="(name)",
    why="A process that is spawned imports vLLM for 5 to 15 s before it loads plugins, and goes on"
    " for as long where its parent was killed meanwhile. It gets ahead of all imports what lets it"
    " end with its parent.",
    upstream=UPSTREAM,
    until="vLLM's processes end with their parent",
    checked=("3.11", "3.12", "3.13"),
)
def end_while_importing(original: Any) -> Any:
    from lvllm.faults.orphans import Birth, is_vllms

    def get_preparation_data(name: str) -> dict[str, Any]:
        data: dict[str, Any] = original(name)
        return {"lvllm": Birth(), **data} if is_vllms(name) else data

    return get_preparation_data


@patch(
    "vllm.v1.executor.multiproc_executor:MultiprocExecutor._ensure_worker_termination",
    signature="(worker_procs)",
    why="A worker whose fellow has died while they meet waits for it in C++, and sees no signal."
    " vLLM gives it 5 s, and 4 s more after SIGTERM. It is killed after"
    " VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS or, where that is not set, 3 s; others end in 1 s.",
    upstream=UPSTREAM,
    until="vLLM kills its workers sooner",
)
def end_workers_that_wait(original: Any) -> Any:
    from lvllm.faults import shutdown

    def _ensure_worker_termination(worker_procs: Any) -> None:
        seconds = os.environ.get("VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS", 3)
        shutdown.end_workers(worker_procs, float(seconds))

    return _ensure_worker_termination
