"""The same model in Hugging Face transformers, float32, as the reference for a generation."""

from pathlib import Path
from typing import Any

import torch
import transformers


def load(folder: Path) -> Any:
    """The checkpoint's values, computed with in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def without_experts(model: Any) -> Any:
    """The model with its routed experts' output set to zero: what a comparison must detect."""
    for name, parameter in model.named_parameters():
        if ".experts." in name and "down" in name:
            parameter.data.zero_()
    return model


@torch.no_grad()
def logprobs(model: Any, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """Log-probabilities [len(tokens), vocabulary] at the places where `tokens` were chosen."""
    ids = torch.tensor([prompt + tokens])
    logits = model(input_ids=ids).logits[0].double()
    return torch.log_softmax(logits, dim=-1)[len(prompt) - 1 : -1]
