"""The Python face of lk, the CPU engine: the expert block of a Mixture-of-Experts layer.

This folder imports no vLLM, so the engine can be used on its own::

    layer = ExpertLayer(format="bf16", w13=w13, w2=w2)
    y = layer(x, topk_ids, topk_weights)
"""

from lvllm.engine.arithmetic import (
    Arithmetic,
    arithmetic_of,
    available_isas,
    explain,
    format_arithmetics,
)
from lvllm.engine.expert_layer import Activation, ExpertLayer
from lvllm.engine.linear_layer import OWN_FORMAT, LinearLayer
from lvllm.engine.ops import raw_ops
from lvllm.engine.runtime import (
    ISAS,
    Binding,
    EngineInfo,
    Node,
    Topology,
    configure,
    info,
    on_isa,
    topology,
    watch,
)
from lvllm.engine.weight_formats import DTYPES, FORMATS

__all__ = [
    "DTYPES",
    "FORMATS",
    "ISAS",
    "OWN_FORMAT",
    "Activation",
    "Arithmetic",
    "Binding",
    "EngineInfo",
    "ExpertLayer",
    "LinearLayer",
    "Node",
    "Topology",
    "arithmetic_of",
    "available_isas",
    "configure",
    "explain",
    "format_arithmetics",
    "info",
    "on_isa",
    "raw_ops",
    "topology",
    "watch",
]
