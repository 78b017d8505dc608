"""GPU offload: experts that stream to a GPU or are computed on the CPU beside it.

Plain PyTorch and lk; nothing here knows vLLM.
"""
