"""What both kinds of workers do to verify their layers of experts."""

from typing import Any

import torch

from lvllm.engine import ExpertLayer
from lvllm.errors import LayerError
from lvllm.faults import process
from lvllm.faults.nonfinite import modules_of
from lvllm.log import logger
from lvllm.settings.configuration import HybridConfig
from lvllm.verifying import model as verifying

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


def verify_experts(model: torch.nn.Module) -> list[str]:
    """Verify all layers. Returns a `LayerReport` of each as JSON, for another process to read."""
    return [report.model_dump_json() for report in verifying.verify(_layers(model))]


def _layers(model: torch.nn.Module) -> dict[str, ExpertLayer]:
    """The layers that this worker has in the engine, by their names in the model."""
    return {layer.layer_name: layer.engine for layer in modules_of(model)}
