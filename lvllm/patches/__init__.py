"""What LvLLM replaces in vLLM, transformers and PyTorch at run time: one module a gap."""
