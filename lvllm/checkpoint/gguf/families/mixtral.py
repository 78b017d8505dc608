"""Mixtral and MiniMax-M2, whose experts are called w1, w2 and w3."""

from collections.abc import Sequence
from typing import Any

import torch

from lvllm.checkpoint.gguf.architecture import Architecture, Change
from lvllm.checkpoint.gguf.families.common import (
    ATTENTION,
    HEAD_NORMS,
    NORMS,
    basics,
    chosen_by_bias,
    experts,
    heads,
    scoring,
)
from lvllm.checkpoint.gguf.fields import Fields

__all__ = ["MINIMAX", "MIXTRAL"]

ROUTED = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
    "exp_probs_b.bias": "block_sparse_moe.e_score_correction_bias",
}


def _mixtral(fields: Fields) -> dict[str, Any]:
    return {
        **basics(fields),
        **heads(fields),
        **experts(fields, "num_local_experts"),
        "intermediate_size": fields.whole("feed_forward_length", 1, 1 << 20),
        "sliding_window": None,
    }


def _minimax(fields: Fields) -> dict[str, Any]:
    of_heads = heads(fields, partial=True)
    size = fields.whole("expert_feed_forward_length", 1, 1 << 20)
    factor = fields.rotary(of_heads["head_dim"])
    return {
        **basics(fields),
        **of_heads,
        **experts(fields, "num_local_experts"),
        "intermediate_size": size,
        "rotary_dim": int(of_heads["head_dim"] * factor),
        "partial_rotary_factor": factor,
        "scoring_func": scoring(fields),
        "use_routing_bias": chosen_by_bias(fields),
    }


def _in_halves(heads: str) -> Change:
    """Rows of a head's pairs, side by side in the file, as the first half and the second one."""

    def compute(fields: Fields, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        count = fields.whole(heads, 1, 1 << 12, fields.whole("attention.head_count", 1, 1 << 12))
        (rows,) = parts
        return rows.unflatten(0, (count, -1, 2)).transpose(1, 2).flatten(0, 2)

    name = "q" if heads == "attention.head_count" else "k"
    return Change((f"self_attn.{name}_proj.weight",), compute)


MIXTRAL = Architecture(
    "MixtralForCausalLM",
    "mixtral",
    _mixtral,
    {**NORMS, **ATTENTION, **ROUTED},
    {
        "self_attn.q_proj.weight": _in_halves("attention.head_count"),
        "self_attn.k_proj.weight": _in_halves("attention.head_count_kv"),
    },
)
MINIMAX = Architecture(
    "MiniMaxM2ForCausalLM", "minimax_m2", _minimax, {**NORMS, **ATTENTION, **HEAD_NORMS, **ROUTED}
)
