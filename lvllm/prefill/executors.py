"""The processes of the prefill engine: they run behind the decoding engine, and end with it.

An executor is the first object that vLLM makes in an engine's process from the configuration, and
it starts the workers. So the prefill engine has executors of its own, which take what they need to
know from `kv_connector_extra_config`. It could travel in environment variables, too, but then the
decoding engine would have to change its environment to start the process, and the C library allows
that only while no other thread reads it.
"""

import multiprocessing
import os
import select
import threading
from typing import Any, NoReturn

from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

__all__ = ["EXECUTORS", "PrefillMultiprocExecutor", "PrefillUniProcExecutor", "follow"]

NICE = 5
"""How much lower the priority of the prefill engine's threads is. They share CPUs with the decoding
engine's threads, which wait for each other after every operation. On 2 cores, with 2 requests
decoding beside a prompt of 4096 tokens, compared with one engine: at 0 a token takes 3.1 to 4.3
times as long, and the prompt as long; at 5 a token takes 2.1 to 2.7 times as long and the prompt
1.0 to 1.6 times; at 10 it is 1.65 and 1.33 times.
"""


class _Behind:
    """What an executor of the prefill engine does before it starts workers or CUDA.

    The extra configuration of its connector names the process of the decoding engine
    (`decoding_process`) and the GPU (`gpu`, None for the decoding engine's).
    """

    def __init__(self, vllm_config: Any) -> None:
        given = vllm_config.kv_transfer_config.kv_connector_extra_config
        if given["gpu"] is not None:
            # CUDA is not started here yet, and only this thread of the process runs Python or
            # reads the environment by now.
            os.environ["CUDA_VISIBLE_DEVICES"] = str(given["gpu"])
        follow(given["decoding_process"])
        super().__init__(vllm_config)  # type: ignore[call-arg]


class PrefillMultiprocExecutor(_Behind, MultiprocExecutor):
    """vLLM's executor with a process for each worker."""


class PrefillUniProcExecutor(_Behind, UniProcExecutor):
    """vLLM's executor whose worker is in the engine's process."""


EXECUTORS = {"mp": PrefillMultiprocExecutor, "uni": PrefillUniProcExecutor}
"""By vLLM's names of them (`distributed_executor_backend`)."""


def follow(process: int) -> None:
    """Lower this thread's priority below that of `process`, and end when `process` ends.

    Threads and processes that this thread starts later have the lower priority, too. When `process`
    ends, for whatever reason, this process ends with its workers.
    """
    try:
        descriptor = os.pidfd_open(process)
        priority = os.getpriority(os.PRIO_PROCESS, process)
    except ProcessLookupError:
        os._exit(1)
    os.setpriority(os.PRIO_PROCESS, 0, priority + NICE)

    def wait() -> NoReturn:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        poll.poll()
        for worker in multiprocessing.active_children():
            worker.kill()
        os._exit(1)

    threading.Thread(target=wait, name="lvllm-follow", daemon=True).start()
