"""What 8-bit activations cost in quality, beside what each weight format costs by itself.

    python -m benchmarks.activation_bits

This runs examples/models/tiny-moe in transformers, with its experts rounded to each format as
`lvllm export` rounds them. The model reads the 500 held-out problems in several wordings each, and
a variant's KL divergence is taken from the model whose experts are not rounded. The variants of a
format differ in their activations: 16 bits, 8 bits in lk's blocks, and 8 bits with one scale for
each token, as other engines have them.

All variants are computed in float32 on dequantised weights, with activations that are rounded and
scaled back. So a variant can be measured on a CPU that lacks its instructions, and nothing is
rounded but what the variant rounds: activations of 16 bits are exact here. The second table has
what the engine itself computes on this CPU. tests/benchmarks/test_activation_bits.py compares the
two layer by layer.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from lvllm import engine
from lvllm.engine import ExpertLayer, dequantize, quantize
from lvllm.engine.weight_formats import FORMATS
from lvllm.evaluation import ask_transformers, load_questions, score
from lvllm.evaluation.likelihood import Likelihoods, compare
from lvllm.evaluation.logprobs import logprobs_from_transformers
from lvllm.evaluation.passages import LocalTokenizer, Passages, of_chats
from lvllm.evaluation.questions import Question

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

from tiny_moe.tasks import held_out_in_other_words  # noqa: E402

MODEL = EXAMPLES / "models/tiny-moe"
DRAWS = 24
"""How often a wording is drawn of each problem; equal ones count once."""
Blocks = tuple[int, int]
"""How many values share a scale: of x, and of the intermediate."""
A_TOKEN: Blocks = (1 << 30, 1 << 30)
"""One scale for all values of a token."""
Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Computes experts from x [M, H], ids [M, k] and router weights [M, k]."""
Variant = Callable[[Qwen3MoeExperts], Forward]


@dataclass(frozen=True)
class Weights:
    """A weight format, with the group size of int4."""

    format: str
    group_size: int | None = None

    def __str__(self) -> str:
        return self.format + (f", groups of {self.group_size}" if self.group_size else "")

    def tensors(self, experts: Qwen3MoeExperts) -> dict[str, Any]:
        """The arguments of `ExpertLayer` for the experts, rounded."""
        found: dict[str, Any] = {"format": self.format, "group_size": self.group_size}
        parts = (("w13", experts.gate_up_proj, (2,)), ("w2", experts.down_proj, ()))
        for name, weight, of_expert in parts:
            match self.format:
                case "int8":
                    codes, scale = quantize.int8(weight.data)
                case "int4":
                    assert self.group_size is not None
                    codes, scale = quantize.int4(weight.data, self.group_size)
                case "mxfp4":
                    codes, scale = quantize.mxfp4(weight.data)
                case "nvfp4":
                    codes, scale, of_all = quantize.nvfp4(weight.data)
                    found[f"{name}_global_scale"] = of_all.repeat(len(codes), *of_expert)
            found |= {name: codes, f"{name}_scale": scale}
        return found

    def blocks(self, *, vnni: bool) -> Blocks | None:
        """The blocks of lk's 8-bit activations; None: it keeps 16 bits. See csrc/lk/moe.cpp."""
        if self.format == "int8" and not vnni:
            return None
        group = self.group_size or FORMATS[self.format].group_size or 256
        most = 256 if vnni else 64 if self.format == "int4" else 32
        of_x, of_intermediate = (
            next(size for size in (256, 128, 64, 32, 16) if size <= limit and group % size == 0)
            for limit in (most, 32)
        )
        return of_x, of_intermediate


CASES = (
    Weights("int8"),
    Weights("int4", 32),
    Weights("int4", 128),
    Weights("mxfp4"),
    Weights("nvfp4"),
)


def rounded(values: torch.Tensor, block: int) -> torch.Tensor:
    """Values [..., K] in 8 bits, with a scale for each `block` of them, and scaled back."""
    blocks = values.unflatten(-1, (-1, min(block, values.shape[-1])))
    top = blocks.abs().amax(-1, keepdim=True)
    codes = (blocks * torch.where(top > 0, 127 / top, 0)).round()
    return (codes * (top / 127)).flatten(-2)


def emulated(w13: torch.Tensor, w2: torch.Tensor, blocks: Blocks | None) -> Forward:
    """Experts [E, 2I, H] and [E, H, I] in float32. Without `blocks`, activations are exact."""

    def forward(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if blocks:
            x = rounded(x, blocks[0])
        out = torch.zeros_like(x)
        for expert in range(len(w13)):
            token, slot = torch.where(ids == expert)
            gate, up = F.linear(x[token], w13[expert]).chunk(2, dim=-1)
            intermediate = F.silu(gate) * up
            if blocks:
                intermediate = rounded(intermediate, blocks[1])
            y = F.linear(intermediate, w2[expert])
            out.index_add_(0, token, y * weights[token, slot, None])
        return out

    return forward


def unrounded(experts: Qwen3MoeExperts) -> Forward:
    return emulated(experts.gate_up_proj.data, experts.down_proj.data, None)


def in_float(weights: Weights, blocks: Blocks | None) -> Variant:
    def variant(experts: Qwen3MoeExperts) -> Forward:
        tensors = weights.tensors(experts)
        w13, w2 = (
            torch.stack([dequantize.values(tensors, name, i) for i in range(experts.num_experts)])
            for name in ("w13", "w2")
        )
        return emulated(w13, w2, blocks)

    return variant


def in_engine(weights: Weights, bits: int) -> Variant:
    def variant(experts: Qwen3MoeExperts) -> Forward:
        layer = ExpertLayer(**weights.tensors(experts), activation_bits=bits)
        # float16 rounds x and the result to 11 bits, bfloat16 to 8.
        return lambda x, ids, weights: layer(x.half(), ids, weights.float()).float()

    return variant


@dataclass(frozen=True)
class Reader:
    """Reads the held-out problems with any variant of the demo model's experts."""

    network: Any
    passages: Passages
    problems: NDArray[np.int64]
    """The number of each scored token's problem."""

    def read(self, variant: Variant) -> Likelihoods:
        for module in self.network.modules():
            if isinstance(module, Qwen3MoeExperts):
                module.forward = variant(module)
        return logprobs_from_transformers(
            self.passages, MODEL, self.network.config.vocab_size, network=self.network
        )

    def right_answers(self) -> str:
        """The share of the 500 questions that the variant which was read last answers right."""
        questions = load_questions()
        answers = ask_transformers(questions, MODEL, network=self.network)
        return f"{score(questions, answers).accuracy:.1%}"

    def mean(self, values: NDArray[np.float64]) -> str:
        """The mean of a value for each scored token, and its standard error, in 1e-6.

        The tokens of a problem depend on each other; the problems are what is independent.
        """
        of_problems = np.bincount(self.problems, values - values.mean())
        error = math.sqrt((of_problems**2).sum()) / len(values)
        return f"{values.mean() * 1e6:.2f} ± {error * 1e6:.2f}"

    def added(self, divergences: NDArray[np.float64], alone: NDArray[np.float64] | None) -> str:
        """Cells: the mean divergence, what it adds to that of the weights `alone`, and its share.

        The difference is taken token by token, so most of the errors of both cancel.
        """
        if alone is None:
            return f"{self.mean(divergences)} | | "
        share = divergences.mean() / alone.mean() - 1
        return f"{self.mean(divergences)} | {self.mean(divergences - alone)} | {share:.1%}"


def load() -> Reader:
    network = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32")
    questions = [Question(**asdict(drawn)) for drawn in held_out_in_other_words(DRAWS)]
    passages = of_chats(questions, LocalTokenizer(str(MODEL)))
    numbers = {(question.task, question.operands): i for i, question in enumerate(load_questions())}
    scored = [len(ids) - first for ids, first in zip(passages.ids, passages.first, strict=True)]
    of_chat = [numbers[question.task, question.operands] for question in questions]
    return Reader(network, passages, np.repeat(of_chat, scored))


def variants(weights: Weights) -> Iterator[tuple[str, Blocks | None]]:
    """The name and the blocks of each variant of a format; the first one has 16 bits."""
    yield "16 bits", None
    vnni, avx2 = weights.blocks(vnni=True), weights.blocks(vnni=False)
    for of, blocks in (("", vnni),) if vnni == avx2 else ((", VNNI", vnni), (", AVX2", avx2)):
        if blocks is not None:
            yield f"8 bits, blocks of {blocks[0]} and {blocks[1]}{of}", blocks
    yield "8 bits, a scale a token", A_TOKEN


def main() -> None:
    """Print the two tables."""
    reader = load()
    reference = reader.read(unrounded)
    print(
        f"{len(reader.problems)} tokens of {len(reader.passages.ids)} chats. Perplexity of the"
        f" model: {reference.perplexity:.5f}; right answers: {reader.right_answers()}.\n"
    )
    print("| weights | activations | KL, 1e-6 | added | share | perplexity | right answers |")
    print("|---|---|---:|---:|---:|---:|---:|", flush=True)
    for weights in CASES:
        alone = None
        for name, blocks in variants(weights):
            read = reader.read(in_float(weights, blocks))
            divergences = compare(reference, read).divergences
            print(
                f"| {weights} | {name} | {reader.added(divergences, alone)}"
                f" | {read.perplexity:.5f} | {reader.right_answers()} |",
                flush=True,
            )
            alone = divergences if alone is None else alone
    print(f"\nThe engine ({engine.info().isa}):\n")
    print("| weights | activations | KL, 1e-6 | added | share |\n|---|---|---:|---:|---:|")
    for weights in CASES:
        alone = None
        for bits in (16, 8):
            divergences = compare(reference, reader.read(in_engine(weights, bits))).divergences
            print(f"| {weights} | {bits} bits | {reader.added(divergences, alone)} |", flush=True)
            alone = divergences if alone is None else alone


if __name__ == "__main__":
    main()
