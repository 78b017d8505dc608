"""The logger of everything that runs inside vLLM."""

from vllm.logger import init_logger

__all__ = ["logger"]

# vLLM configures only the loggers whose names begin with its own, so ours has such a name.
logger = init_logger("vllm.plugins.lvllm")
