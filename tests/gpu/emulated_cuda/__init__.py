"""An emulated CUDA: it runs PyTorch, vLLM and LvLLM as on a GPU, on a machine without one.

    python -m tests.gpu.emulated_cuda.run COMMAND ...

The runtime, the driver and NVML are replaced by libraries in C++ (`*.cpp`): device memory is host
memory that the host cannot access under the device's addresses, work is done when it is queued,
captured graphs are replayed, and what CUDA forbids in a capture gives CUDA's errors. PyTorch's
operations, Triton's kernels and a few of vLLM's are computed on the host (`operations.py`,
`interpreter.py`, `operators.py`). All other kernels do nothing, and leave what was in memory.

It shows what ends a start, a capture or a step with an error, and what a small model answers. It
shows no races, since streams do not run beside each other (the stand-in's do, `lvllm/gpu`), no
limits of real kernels, and no speed.
"""
