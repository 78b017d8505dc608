"""The reference for a generation: the same model in Hugging Face transformers, in float32."""

import json
import re
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.models import step3p5


def load(folder: Path) -> Any:
    """Load the checkpoint in `folder` into a model that computes in float32."""
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] == "step3p5":
        return step3p5.Reference(folder)
    more = {}
    if config["model_type"] == "kimi_k2":  # it is a DeepSeek-V3, under a name that only vLLM has
        more["config"] = transformers.DeepseekV3Config.from_pretrained(folder)
        more["config"].model_type = "deepseek_v3"  # it decides the names of the experts
    auto = (
        transformers.AutoModelForImageTextToText
        if "vision_config" in config
        else transformers.AutoModelForCausalLM
    )
    model = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", **more)
    return model.eval()


def without_experts(model: Any) -> Any:
    """Set the output of the model's routed experts to zero, which a comparison must detect."""
    for name, parameter in model.named_parameters():
        if re.search(r"\.experts\..*down|\.moe\.down", name):
            parameter.data.zero_()
    return model


def without_zero_experts(model: Any) -> Any:
    """Set the output of a LongCat-Flash's experts without weights to zero."""
    replaced = [module for module in model.modules() if hasattr(module, "identity_expert")]
    assert replaced
    for module in replaced:
        module.identity_expert.forward = torch.zeros_like
    return model


@torch.no_grad()
def logprobs(model: Any, prompt: list[int], tokens: list[int], **picture: Any) -> torch.Tensor:
    """Log-probabilities [len(tokens), vocabulary] at the places where `tokens` were chosen.

    `picture` has the inputs that a model with vision takes beside `input_ids`.
    """
    ids = torch.tensor([prompt + tokens])
    if picture:
        picture["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    logits = model(input_ids=ids, **picture).logits[0].double()
    return torch.log_softmax(logits, dim=-1)[len(prompt) - 1 : -1]
