"""Everything of vLLM, transformers and PyTorch that LvLLM replaces or adds at run time.

Each module fills one gap, and `lvllm.patches.registry` does the replacing. `lvllm env --patches`
and docs/patches.md list the targets.
"""

# Importing a module declares its replacements.
from lvllm.patches import (
    collectives,
    configuration,
    experts,
    failures,
    gloo,
    kernels,
    killed,
    loading,
    loopback,
    lora,
    metrics,
    padding,
    picture_attention,
    picture_steps,
    pictures,
    privacy,
    ray_cluster,
    routing,
    segments,
    stages,
)
from lvllm.patches.registry import Patch, PatchError, install, patches

__all__ = [
    "Patch",
    "PatchError",
    "collectives",
    "configuration",
    "experts",
    "failures",
    "gloo",
    "install",
    "kernels",
    "killed",
    "loading",
    "loopback",
    "lora",
    "metrics",
    "padding",
    "patches",
    "picture_attention",
    "picture_steps",
    "pictures",
    "privacy",
    "ray_cluster",
    "routing",
    "segments",
    "stages",
]
