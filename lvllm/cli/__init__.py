"""The `lvllm` command."""

from lvllm.cli.app import main

__all__ = ["main"]
