"""GPU offload: activations are on a GPU, experts lie on the host and are computed on either."""

from lvllm.gpu.break_even import MeasuredThreshold
from lvllm.gpu.devices import open_accelerator
from lvllm.gpu.hybrid import host_calls, raise_host_call_error
from lvllm.gpu.offload import Offload, caches, mark_others, mark_step, waiting_for_cache
from lvllm.gpu.offloaded_layer import OffloadedLayer, concentrated_routing
from lvllm.gpu.resident_layer import ResidentLayer
from lvllm.gpu.watchdog import Watchdog

__all__ = [
    "MeasuredThreshold",
    "Offload",
    "OffloadedLayer",
    "ResidentLayer",
    "Watchdog",
    "caches",
    "concentrated_routing",
    "host_calls",
    "mark_others",
    "mark_step",
    "open_accelerator",
    "raise_host_call_error",
    "waiting_for_cache",
]
