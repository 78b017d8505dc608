"""Qwen3-Next, and Qwen3.5 and 3.6 with experts: most layers have linear attention.

ggml's tools store norms as what they multiply with, and what decays as -exp of the checkpoint's
numbers. Of Qwen3.5 they store the heads of values in another order: the first head of each key,
then the second ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lvllm.checkpoint.gguf.architecture import Architecture, Change
from lvllm.checkpoint.gguf.families.common import ATTENTION, HEAD_NORMS, ROUTED, heads
from lvllm.checkpoint.gguf.families.qwen import SHARED, qwen3
from lvllm.checkpoint.gguf.fields import Fields

__all__ = ["QWEN3_5", "QWEN3_NEXT"]

LAYER = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    **ATTENTION,
    **HEAD_NORMS,
    **ROUTED,
    **SHARED,
    "attn_qkv": "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_a": "linear_attn.A_log",
    "ssm_dt.bias": "linear_attn.dt_bias",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
}


@dataclass(frozen=True)
class _Sizes:
    """Of linear attention."""

    keys: int
    """How many heads of keys there are."""
    values: int
    key: int
    """The size of a head of keys."""
    value: int

    @classmethod
    def of(cls, fields: Fields) -> "_Sizes":
        keys = fields.whole("ssm.group_count", 1, 1 << 12)
        values = fields.whole("ssm.time_step_rank", keys, 1 << 12)
        if values % keys:
            raise fields.refuse("ssm.time_step_rank", values, f"a multiple of {keys} is wanted")
        inner = fields.whole("ssm.inner_size", values, 1 << 20)
        return cls(keys, values, fields.whole("ssm.state_size", 1, 1 << 16), inner // values)

    def apart(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows of queries, keys and values."""
        size = self.keys * self.key
        query, key, value = rows.split((size, size, self.values * self.value))
        return query, key, value

    def by_key(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of all heads of values, with the heads of a key side by side."""
        return (
            rows.unflatten(0, (self.values // self.keys, self.keys, -1))
            .transpose(0, 1)
            .flatten(0, 2)
        )


Compute = Callable[[_Sizes, Sequence[torch.Tensor]], torch.Tensor]


def _change(name: str, compute: Compute, *parts: str) -> dict[str, Change]:
    """A change of the tensor `name`, or of the tensors that are its `parts`."""
    return {name: Change(parts or (name,), lambda fields, of: compute(_Sizes.of(fields), of))}


def _qkvz(sizes: _Sizes, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """For each head of keys: its query, its key, its values and their gates."""
    rows = (*sizes.apart(parts[0]), parts[1])
    return torch.cat([some.unflatten(0, (sizes.keys, -1)) for some in rows], 1).flatten(0, 1)


def _qkv(sizes: _Sizes, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    query, key, value = sizes.apart(parts[0])
    return torch.cat((query, key, sizes.by_key(value)))


COMMON: dict[str, Change] = {}
for _norm in (
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    "self_attn.q_norm.weight",
    "self_attn.k_norm.weight",
    "model.norm.weight",
):
    COMMON |= _change(_norm, lambda _, parts: parts[0].float() - 1)


def _config(fields: Fields) -> dict[str, Any]:
    sizes, of_heads = _Sizes.of(fields), heads(fields, partial=True)
    every = fields.whole("full_attention_interval", 1, 1 << 10, 4)
    kinds = ["linear_attention"] * (every - 1) + ["full_attention"]
    return {
        **qwen3(fields, of_heads),
        "shared_expert_intermediate_size": fields.whole(
            "expert_shared_feed_forward_length", 1, 1 << 20
        ),
        "layer_types": [kinds[layer % every] for layer in range(fields.layers)],
        "partial_rotary_factor": fields.rotary(of_heads["head_dim"]),
        "linear_conv_kernel_dim": fields.whole("ssm.conv_kernel", 1, 1 << 10),
        "linear_key_head_dim": sizes.key,
        "linear_value_head_dim": sizes.value,
        "linear_num_key_heads": sizes.keys,
        "linear_num_value_heads": sizes.values,
    }


QWEN3_NEXT = Architecture(
    "Qwen3NextForCausalLM",
    "qwen3_next",
    _config,
    {**LAYER, "ssm_in": "linear_attn.in_proj_qkvz", "ssm_ba": "linear_attn.in_proj_ba"},
    {
        **COMMON,
        **_change("linear_attn.A_log", lambda _, parts: (-parts[0]).log()),
        **_change("linear_attn.conv1d.weight", lambda _, parts: parts[0].unsqueeze(1)),
        **_change(
            "linear_attn.in_proj_qkvz.weight",
            _qkvz,
            "linear_attn.in_proj_qkv.weight",
            "linear_attn.in_proj_z.weight",
        ),
    },
)
QWEN3_5 = Architecture(
    "Qwen3_5MoeForCausalLM",
    "qwen3_5_moe_text",
    _config,
    {**LAYER, "ssm_alpha": "linear_attn.in_proj_a", "ssm_beta": "linear_attn.in_proj_b"},
    {
        **COMMON,
        **_change("linear_attn.A_log", lambda sizes, parts: sizes.by_key((-parts[0]).log())),
        **_change("linear_attn.dt_bias", lambda sizes, parts: sizes.by_key(parts[0])),
        **_change(
            "linear_attn.conv1d.weight", lambda sizes, parts: _qkv(sizes, parts).unsqueeze(1)
        ),
        **_change("linear_attn.in_proj_qkv.weight", _qkv),
        **_change("linear_attn.in_proj_z.weight", lambda sizes, parts: sizes.by_key(parts[0])),
        **_change("linear_attn.in_proj_a.weight", lambda sizes, parts: sizes.by_key(parts[0])),
        **_change("linear_attn.in_proj_b.weight", lambda sizes, parts: sizes.by_key(parts[0])),
        **_change(
            "linear_attn.out_proj.weight", lambda sizes, parts: sizes.by_key(parts[0].t()).t()
        ),
    },
)
