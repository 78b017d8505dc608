"""Everything of vLLM, transformers and PyTorch that LvLLM replaces or adds at run time.

Each module fills one gap, and `lvllm.patches.registry` does the replacing. `lvllm env --patches`
and docs/patches.md list the targets.
"""

# Importing a module declares its replacements, which are installed in this order.
from lvllm.patches import experts  # isort: skip
from lvllm.patches import configuration  # isort: skip
from lvllm.patches.registry import Patch, PatchError, install, patches

__all__ = ["Patch", "PatchError", "configuration", "experts", "install", "patches"]
