"""Which experts the layers of a model read in each step: made up, or recorded from a model.

Made-up routing has two parts. Some experts of a layer are chosen more often than others (Zipf's
law: the chance of the n-th is n^-skew), and each request has a topic with favourites of its own,
which changes every some hundred tokens. The skew is fitted to a number that was reported for
Qwen3-30B-A3B: 512 tokens of a prompt choose 72 to 95 of 128 experts.
"""

import random
from collections.abc import Iterator
from pathlib import Path

import torch

__all__ = ["distinct", "fitted_skew", "made_up", "recorded"]

TOPICS = 40
TOPIC_TOKENS = 300
"""A request keeps its topic for so many tokens on average."""
OWN = 0.5
"""The share of a topic's favourites in the choice of an expert."""


def _popularity(layers: int, experts: int, skew: float, draw: torch.Generator) -> torch.Tensor:
    """Return log-chances [layers, experts] with the favourites of each layer in any order."""
    order = torch.rand(layers, experts, generator=draw).argsort(dim=1)
    return -skew * (order + 1).float().log()


def _choose(chances: torch.Tensor, topk: int, draw: torch.Generator) -> torch.Tensor:
    """Choose different experts by log-chances [..., experts] -> [..., topk]."""
    noise = -torch.empty_like(chances).exponential_(generator=draw).log()
    return (chances + noise).topk(topk, dim=-1).indices


def made_up(
    layers: int, experts: int, topk: int, skew: float, users: int, steps: int, seed: int
) -> Iterator[torch.Tensor]:
    """Yield for each step a bool [layers, experts]: the experts that are read."""
    draw, topics_draw = torch.Generator().manual_seed(seed), random.Random(seed)
    common = _popularity(layers, experts, skew, draw)
    topics = [_popularity(layers, experts, skew, draw) for _ in range(TOPICS)]
    current = [topics_draw.randrange(TOPICS) for _ in range(users)]
    for _ in range(steps):
        read = torch.zeros(layers, experts, dtype=torch.bool)
        for user in range(users):
            if topics_draw.random() < 1 / TOPIC_TOKENS:
                current[user] = topics_draw.randrange(TOPICS)
            chances = (1 - OWN) * common + OWN * topics[current[user]]
            read.scatter_(1, _choose(chances, topk, draw), True)
        yield read


def distinct(experts: int, topk: int, skew: float, tokens: int, seed: int) -> float:
    """Return how many experts of a layer a prompt of so many tokens chooses on average."""
    draw, layers = torch.Generator().manual_seed(seed), 8
    chances = (1 - OWN) * _popularity(layers, experts, skew, draw)
    chances = chances + OWN * _popularity(layers, experts, skew, draw)
    chosen = _choose(chances[:, None].expand(layers, tokens, experts), topk, draw)
    return float(sum(len(of_layer.unique()) for of_layer in chosen)) / layers


def fitted_skew(experts: int, topk: int, tokens: int, wanted: float) -> float:
    """Return the skew with which a prompt of so many tokens chooses as many experts as `wanted`."""
    low, high = 0.0, 8.0
    while high - low > 0.01:
        middle = (low + high) / 2
        if distinct(experts, topk, middle, tokens, 1) > wanted:
            low = middle
        else:
            high = middle
    return low


def recorded(folder: Path, prompts: list[list[int]], tokens: int) -> Iterator[torch.Tensor]:
    """Yield what a Qwen3-MoE reads in each step when it answers one prompt after the other."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    topk, experts = model.config.num_experts_per_tok, model.config.num_experts
    for prompt in prompts:
        ids, past = torch.tensor([prompt]), None
        for _ in range(tokens):
            with torch.no_grad():
                out = model(ids, past_key_values=past, output_router_logits=True)
            chosen = torch.stack([logits[-1].topk(topk).indices for logits in out.router_logits])
            ids, past = out.logits[:, -1:].argmax(-1), out.past_key_values
            yield torch.zeros(len(chosen), experts, dtype=torch.bool).scatter_(1, chosen, True)
