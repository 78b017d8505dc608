"""The same model in Hugging Face transformers, float32, as the reference for a generation."""

import json
import re
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.models import step3p5


def load(folder: Path) -> Any:
    """The checkpoint's values, computed with in float32."""
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] == "step3p5":
        return step3p5.Reference(folder)
    more = {}
    if config["model_type"] == "kimi_k2":  # DeepSeek-V3 by another name, which is vLLM's alone
        more["config"] = transformers.DeepseekV3Config.from_pretrained(folder)
        more["config"].model_type = "deepseek_v3"  # which says how experts are named
    auto = (
        transformers.AutoModelForImageTextToText
        if "vision_config" in config
        else transformers.AutoModelForCausalLM
    )
    model = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", **more)
    return model.eval()


def without_experts(model: Any) -> Any:
    """The model with its routed experts' output set to zero: what a comparison must detect."""
    for name, parameter in model.named_parameters():
        if re.search(r"\.experts\..*down|\.moe\.down", name):
            parameter.data.zero_()
    return model


@torch.no_grad()
def logprobs(model: Any, prompt: list[int], tokens: list[int], **picture: Any) -> torch.Tensor:
    """Log-probabilities [len(tokens), vocabulary] at the places where `tokens` were chosen.

    `picture` is what a model with vision takes beside `input_ids`.
    """
    ids = torch.tensor([prompt + tokens])
    if picture:
        picture["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    logits = model(input_ids=ids, **picture).logits[0].double()
    return torch.log_softmax(logits, dim=-1)[len(prompt) - 1 : -1]
