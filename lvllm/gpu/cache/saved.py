"""Saves how often each expert was read, so that a restart begins with the right experts."""

import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

__all__ = ["read", "write"]

# vLLM shows the loggers of this name. This package works without vLLM.
logger = logging.getLogger("vllm.plugins.lvllm")


def write(path: Path, layers: Sequence[int], scores: torch.Tensor) -> None:
    """Write scores [layers, experts] to `path`, whole or not at all. A refusal is only logged."""
    of_layers = {
        f"layer.{number}": of.contiguous() for number, of in zip(layers, scores, strict=True)
    }
    other = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        other.write_bytes(save(of_layers))
        other.replace(path)
    except OSError as error:
        # What was written of it would stay for ever, on a disk that is perhaps full.
        with suppress(OSError):
            other.unlink(missing_ok=True)
        logger.warning("LvLLM: how often experts are read cannot be saved: %s", error)


def read(path: Path, layers: Sequence[int], experts: int) -> torch.Tensor | None:
    """Return the scores, float32 [layers, experts]; None if there are none for these layers."""
    try:
        found = load(path.read_bytes())
        scores = torch.stack([found[f"layer.{number}"] for number in layers])
    except (OSError, SafetensorError, KeyError, RuntimeError):
        return None
    fits = scores.shape == (len(layers), experts) and scores.dtype == torch.float32
    return scores if fits and bool((scores >= 0).all()) else None
