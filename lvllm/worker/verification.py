"""What both kinds of workers do to verify their layers of experts."""

from pathlib import Path
from typing import Any

import torch

from lvllm.engine import ExpertLayer
from lvllm.errors import LayerError
from lvllm.faults import process
from lvllm.faults.nonfinite import modules_of
from lvllm.log import logger
from lvllm.settings.configuration import HybridConfig
from lvllm.verifying import model as verifying
from lvllm.worker.gguf_values import GgufValues

__all__ = ["at_start", "verify_experts"]


def at_start(vllm_config: Any, model: torch.nn.Module) -> None:
    """With LVLLM_VERIFY=1, verify the loaded layers quickly; end the engine if one is wrong."""
    if not HybridConfig.carried(vllm_config).verify:
        return
    try:
        said = verifying.quickly(_layers(model))
    except LayerError as error:
        process.end(f"LVLLM_VERIFY: {error}")
    logger.info("LvLLM: %s", said)


def verify_experts(vllm_config: Any, model: torch.nn.Module) -> list[str]:
    """Verify all layers. Returns a `LayerReport` of each as JSON, for another process to read.

    The weights of a model in a GGUF file are compared with the file, too.
    """
    modules = {layer.layer_name: layer for layer in modules_of(model)}
    values = GgufValues.of(Path(vllm_config.model_config.model), modules)
    return [report.model_dump_json() for report in verifying.verify(_layers(model), values)]


def _layers(model: torch.nn.Module) -> dict[str, ExpertLayer]:
    """The layers that this worker has in the engine, by their names in the model."""
    return {layer.layer_name: layer.engine for layer in modules_of(model)}
