"""How much a weight format, and activations of 8 bits, lower the demo model's score.

    python benchmarks/activation_bits.py

This runs examples/models/tiny-moe in transformers, with the experts rounded to nearest in each
format and computed by the lk engine. It asks the model the 500 held-out questions and prints a
markdown table.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from typing import Any

import torch
import typer
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from lvllm import engine
from lvllm.engine import ExpertLayer
from lvllm.evaluation import ask_transformers, load_questions, score

MODEL = Path(__file__).parents[1] / "examples/models/tiny-moe"
CASES = (("bf16", 16), ("int8", 16), ("int8", 8), ("int4", 16), ("int4", 8))
GROUP_SIZE = 32


def quantise(weights: torch.Tensor, format: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Round weights [E, rows, K] to nearest: int8 with a scale per row, int4 per group of 32."""
    if format == "bf16":
        return weights.clone(), None
    if format == "int8":
        scale = weights.float().abs().amax(-1) / 127
        return (weights.float() / scale[..., None]).round().to(torch.int8), scale
    groups = weights.float().unflatten(-1, (-1, GROUP_SIZE))
    scale = (groups.abs().amax(-1) / 7).bfloat16()
    codes = ((groups / scale.float()[..., None]).round().clamp(-8, 7) + 8).to(torch.uint8)
    codes = codes.flatten(-2)
    return codes[..., 0::2] | codes[..., 1::2] << 4, scale


def accuracy(format: str, bits: int) -> float:
    """The share of questions that are answered right."""
    load = AutoModelForCausalLM.from_pretrained

    def patched(*args: Any, **kwargs: Any) -> Any:
        model = load(*args, **kwargs)
        for module in model.modules():
            if isinstance(module, Qwen3MoeExperts):
                replace(module, format, bits)
        return model

    questions = load_questions()
    AutoModelForCausalLM.from_pretrained = patched
    try:
        return score(questions, ask_transformers(questions, MODEL)).accuracy
    finally:
        AutoModelForCausalLM.from_pretrained = load


def replace(experts: Qwen3MoeExperts, format: str, bits: int) -> None:
    """Have the experts of a module computed by lk."""
    w13, w13_scale = quantise(experts.gate_up_proj.data, format)
    w2, w2_scale = quantise(experts.down_proj.data, format)
    layer = ExpertLayer(
        format=format,
        w13=w13,
        w2=w2,
        w13_scale=w13_scale,
        w2_scale=w2_scale,
        group_size=GROUP_SIZE if format == "int4" else None,
        activation_bits=bits if format != "bf16" else None,
    )

    def forward(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return layer(x, ids, weights.float())

    experts.forward = forward


def main() -> None:
    """Print the demo model's score in each format and with activations of 16 and 8 bits."""
    print(f"Engine: {engine.info().isa}.\n")
    print("| experts | activations | right answers of 500 |\n|---|---|---|")
    for format, bits in CASES:
        print(f"| {format} | {bits} bits | {accuracy(format, bits):.1%} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
