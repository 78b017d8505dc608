"""The sizes of a model, from the headers of its GGUF files.

They are counted by the tensors' names and shapes, so they are exact for every architecture whose
tensors have the names that ggml's tools give them. Only attention is described by fields.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from lvllm.checkpoint.gguf_headers import Field, GgufHeader, GgufTensor, open_gguf
from lvllm.errors import quoted
from lvllm.planning.errors import PlanError
from lvllm.planning.gguf_bits import bits_of
from lvllm.planning.shape import UNLIMITED, LayerShape, ModelShape, check_experts

__all__ = ["of_file", "of_header"]

WINDOWS = {"gpt-oss": 2}
"""Architectures whose files do not say which layers have a sliding window: all but every n-th. A
number in `attention.sliding_window_pattern` means the same."""
_LAYER = re.compile(r"^blk\.(\d{1,9})\.(.+)$")
# Old files have one tensor for each expert: ffn_gate.3.weight.
_ROUTED = re.compile(r"^ffn_(?:gate|up|down|gate_up)(?:_exps\.(?:weight|bias)|\.(\d{1,9})\.)")


def of_file(file: Path, name: str) -> ModelShape:
    """The shape of the model in a GGUF file and, if it is a part, in the others.

    Raises:
        CheckpointError: a file that is not there or cannot be read.
        PlanError: a model without routed experts, or one that its fields do not describe.
    """
    return of_header(open_gguf(file), name)


def of_header(header: GgufHeader, name: str) -> ModelShape:
    """The shape of the model that a header describes. Raises PlanError as of_file does."""
    fields = _Fields(header, name)
    count = fields.number("block_count") - fields.number("nextn_predict_layers", 0)
    sizes: dict[int, dict[str, GgufTensor]] = defaultdict(dict)
    others: list[GgufTensor] = []
    routed: list[GgufTensor] = []
    for tensor in header.tensors.values():
        found = _LAYER.match(tensor.name)
        if found is None:
            others.append(tensor)
        elif int(found[1]) < count:  # Later layers are drafts, for speculative decoding.
            sizes[int(found[1])][found[2]] = tensor
            (routed if _ROUTED.match(found[2]) else others).append(tensor)
    missing = next((i for i in range(count) if i not in sizes), None)
    if missing is not None:
        raise PlanError(f"{name}: has no tensors of layer {missing}, and {count} layers are wanted")
    if not routed:
        raise PlanError(f"{name}: the model has no routed experts, for which LvLLM is made")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise PlanError(f"{name}: has no tensor 'token_embd.weight'")
    head = header.tensors.get("output.weight")
    layers = tuple(_layer(sizes[i], fields, i) for i in range(count))
    check_experts(layers, name)
    ends = embedding.weights + (head.weights if head else 0)
    bits, stored = bits_of(
        routed,
        sum(layer.routed for layer in layers),
        others,
        sum(layer.others for layer in layers) + ends,
        str(fields.architecture),
    )
    return ModelShape(
        name=name,
        layers=layers,
        hidden=embedding.shape[0],
        embedding=embedding.weights,
        head=(head or embedding).weights,
        tied=head is None,
        context=fields.number("context_length", 4096),
        bits=bits,
        heads=_heads(fields),
        rows=_rows(routed),
        stored=stored,
    )


class _Fields:
    """The fields that describe the architecture."""

    def __init__(self, header: GgufHeader, name: str) -> None:
        self._fields = header.fields
        self._name = name
        self.architecture = header.fields.get("general.architecture")
        if not isinstance(self.architecture, str):
            raise PlanError(f"{name}: has no field 'general.architecture'")

    def number(self, key: str, default: int | None = None, layer: int = 0) -> int:
        """A number, for each layer or for all. Without a default, PlanError if it is not there."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, list) and layer < len(value):
            value = value[layer]
        if value is None:
            raise PlanError(f"{self._name}: has no field {quoted(self._full(key))}")
        if not isinstance(value, int) or value < 0:
            raise self.refuse(key, value, "a number is wanted")
        return value

    def positive(self, key: str, layer: int = 0) -> int:
        value = self.number(key, layer=layer)
        if value == 0:
            raise self.refuse(key, value, "at least 1 is wanted")
        return value

    def get(self, key: str) -> Field | None:
        return self._fields.get(self._full(key))

    def rows(self, matrix: GgufTensor) -> int:
        if len(matrix.shape) != 2:
            raise PlanError(
                f"{self._name}: tensor {quoted(matrix.name)} has the shape {matrix.shape}, a matrix"
                " is wanted"
            )
        return matrix.shape[1]

    def refuse(self, key: str, value: object, wanted: str) -> PlanError:
        return PlanError(
            f"{self._name}: field {quoted(self._full(key))} is {quoted(value)}, {wanted}"
        )

    def _full(self, key: str) -> str:
        return f"{self.architecture}.{key}"


def _layer(tensors: Mapping[str, GgufTensor], fields: _Fields, number: int) -> LayerShape:
    experts = routed = others = chosen = 0
    for name, tensor in tensors.items():
        if found := _ROUTED.match(name):
            experts = max(experts, int(found[1]) + 1 if found[1] else tensor.shape[-1])
            routed += tensor.weights
        else:
            others += tensor.weights
    if experts:
        chosen = fields.positive("expert_used_count", number)
        if chosen > experts:
            raise fields.refuse("expert_used_count", chosen, f"layer {number} has {experts}")
    cached, attended, in_prompts = _attention(tensors, fields, number)
    return LayerShape(
        number=number,
        experts=experts,
        chosen=chosen,
        expert=routed // experts if experts else 0,
        others=others,
        cached=cached,
        window=_window(fields, number),
        attended=attended,
        attended_in_prompts=in_prompts,
    )


def _rows(routed: Sequence[GgufTensor]) -> int | None:
    """The columns of the down projections, as many as the gate projections have rows."""
    found = {tensor.shape[0] for tensor in routed if re.search(r"ffn_down.*weight", tensor.name)}
    return found.pop() if len(found) == 1 else None


def _heads(fields: _Fields) -> tuple[int, int] | None:
    heads = fields.get("attention.head_count")
    key_heads = fields.get("attention.head_count_kv") or heads
    if isinstance(heads, int) and isinstance(key_heads, int):
        return heads, key_heads
    return None


def _attention(
    tensors: Mapping[str, GgufTensor], fields: _Fields, number: int
) -> tuple[int, int, int]:
    """As `lvllm.planning.shape` says: values in the KV cache, and multiplications."""
    if any(name.startswith("ssm_") for name in tensors):
        return 0, 0, 0  # Linear attention has a state that does not grow.
    if latent := tensors.get("attn_kv_a_mqa.weight"):
        heads = fields.positive("attention.head_count", number)
        values = fields.rows(latent)  # the latent ones and the rotary key
        rank = fields.positive("attention.kv_lora_rank")
        # In newer files, key_length is that of a decoding step, which equals `values`.
        sizes = ("attention.key_length", "attention.value_length")
        suffix = "_mla" if fields.get(f"{sizes[0]}_mla") is not None else ""
        in_prompts = sum(fields.positive(size + suffix) for size in sizes)
        return values, heads * (rank + values), heads * in_prompts
    key, value = tensors.get("attn_k.weight"), tensors.get("attn_v.weight")
    if key is None and "attn_qkv.weight" not in tensors:
        return 0, 0, 0
    heads = fields.positive("attention.head_count", number)
    key_heads = fields.number("attention.head_count_kv", heads, number) or heads
    if key is not None:
        cached = fields.rows(key) + fields.rows(value or key)
    else:
        length = fields.positive("embedding_length") // heads
        sizes = ("attention.key_length", "attention.value_length")
        cached = key_heads * sum(fields.number(size, length) for size in sizes)
    attended = heads * (cached // key_heads)
    return cached, attended, attended


def _window(fields: _Fields, number: int) -> int:
    window = fields.number("attention.sliding_window", 0)
    pattern = fields.get("attention.sliding_window_pattern")
    every = WINDOWS.get(str(fields.architecture)) if pattern is None else pattern
    if isinstance(every, list) and every:
        sliding = bool(every[number % len(every)])
    elif isinstance(every, int):
        sliding = every == 0 or number % every < every - 1
    else:
        sliding = False  # Looking at everything needs the larger KV cache.
    return window if sliding and window else UNLIMITED
