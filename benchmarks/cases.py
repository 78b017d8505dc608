"""The shapes of expert blocks, and routed batches of tokens for them.

This needs only NumPy and PyTorch, since peers run in interpreters of their own.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass

import numpy as np
import torch

# Hidden size x intermediate size x experts x top-k, of the routed experts.
SHAPES = {
    "qwen3-30b-a3b": "2048x768x128x8",
    "qwen3-235b-a22b": "4096x1536x128x8",
    "qwen3-next-80b-a3b": "2048x512x512x10",
    "mixtral-8x7b": "4096x14336x8x2",
    "deepseek-v2-lite": "2048x1408x64x6",
    "deepseek-v3": "7168x2048x256x8",
    "deepseek-v3-32": "7168x2048x32x8",  # An eighth of the experts, for smaller machines.
    "glm-4.5-air": "4096x1408x128x8",
    "gpt-oss-20b": "2880x2880x32x4",
    "olmoe-1b-7b": "2048x1024x64x8",
    "tiny": "64x32x4x2",
}


class UserError(Exception):
    """A request that cannot be served; the message is one line for the user."""


@dataclass(frozen=True)
class Shape:
    hidden: int
    intermediate: int
    experts: int
    topk: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        match = re.fullmatch(r"(\d+)x(\d+)x(\d+)x(\d+)", SHAPES.get(text.lower(), text))
        if not match:
            raise UserError(
                f"--shape is {text!r}, must be HxIxExK (hidden, intermediate, experts, top-k; "
                f"2048x768x128x8) or one of {', '.join(SHAPES)}"
            )
        shape = cls(*(int(part) for part in match.groups()))
        if min(asdict(shape).values()) < 1:
            raise UserError(f"--shape is {text!r}, every size must be at least 1")
        if shape.topk > shape.experts:
            raise UserError(f"--shape is {text!r}: top-{shape.topk} of {shape.experts} experts")
        return shape

    def __str__(self) -> str:
        return "x".join(str(size) for size in asdict(self).values())

    @property
    def expert_weights(self) -> int:
        return 3 * self.hidden * self.intermediate

    def operations(self, tokens: int) -> int:
        return 2 * tokens * self.topk * self.expert_weights


@dataclass(frozen=True)
class Batch:
    """Tokens with their routing: x [M, H], ids [M, k] int32, weights [M, k] float32."""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor


def routing(shape: Shape, tokens: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Expert ids and weights of each token, the same in every interpreter.

    NumPy guarantees that the stream of `RandomState` never changes. PyTorch's generators do not.
    """
    scores = np.random.RandomState(seed).standard_normal((tokens, shape.experts))
    ids = np.argsort(-scores, axis=1)[:, : shape.topk]
    weights = np.exp(np.take_along_axis(scores, ids, axis=1))
    weights /= weights.sum(axis=1, keepdims=True)
    return ids.astype(np.int32), weights.astype(np.float32)


def batch(shape: Shape, tokens: int, seed: int, dtype: torch.dtype) -> Batch:
    ids, weights = routing(shape, tokens, seed)
    x = np.random.RandomState(seed + 1).standard_normal((tokens, shape.hidden))
    return Batch(
        torch.from_numpy(x.astype(np.float32)).to(dtype),
        torch.from_numpy(ids),
        torch.from_numpy(weights),
    )


def seeds(tokens: int) -> list[int]:
    """Seeds of the batches of that size, which take turns so that calls need different experts.

    A large batch needs every expert anyway, so there are fewer of them.
    """
    return [1000 * tokens + 2 * i for i in range(8 if tokens <= 64 else 2)]
