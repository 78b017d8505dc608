"""The engines that benchmarks/moe_block.py times, lk among them: one module each.

A module has

    PACKAGE                 what `pip install` brings it, "" if nothing is to be installed
    FORMATS                 the weight formats that it computes
    version() -> str        raises ImportError if it is not there
    prepare(weights, settings) -> layer   from row-major random weights; owns what it makes of them
    run(layer, batch) -> Tensor           [M, H]

and runs in a process of its own, maybe of another interpreter (`protocol.Peer`, `serve`).
"""

MODULES = {
    "lk": "lk",
    "torch": "torch_experts",
    "vllm-vec": "vllm_vec",
    "vllm-sgl": "vllm_sgl",
    "zentorch": "zentorch_experts",
    "llama.cpp": "llama_cpp",
    "kt-kernel": "kt_experts",
}
