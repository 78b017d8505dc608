"""Make an `ExpertLayer` of weights that this process loaded, or that another engine shares."""

from typing import Any

from lvllm import sharing
from lvllm.engine import ExpertLayer
from lvllm.engine.weight_formats import preferred_activation_bits
from lvllm.formats.base import check_scales
from lvllm.moe import activations

__all__ = ["make", "make_of_shared"]


def make(
    layer: Any,
    tensors: dict[str, Any],
    activation_bits: int | None,
    publisher: sharing.Publisher | None,
) -> ExpertLayer:
    """The engine's layer for the loaded weights and biases of vLLM's `layer`.

    `tensors` are the arguments of `ExpertLayer` that hold the weights (`ExpertFormat.tensors`);
    `activation_bits` is the setting LK_ACTIVATION_BITS, None for `auto`. With a `publisher`, other
    engines can map the layer from now on.

    Raises ValueError if a bias is missing or not finite.
    """
    stored = dict(tensors)
    if layer.moe_config.has_bias:
        w13_bias, w2_bias = check_scales(layer, "bias")
        if layer.moe_config.tp_rank != 0:
            w2_bias.zero_()  # The outputs of all ranks are summed, so one rank alone adds the bias.
        stored |= {"w13_bias": w13_bias, "w2_bias": w2_bias}
    stored |= _activation_bits(stored, activation_bits)
    if publisher is None:
        return _expert_layer(layer, stored)
    stored = publisher.in_shared_memory(stored)
    expert_layer = _expert_layer(layer, stored)
    publisher.publish(layer.layer_name, stored, expert_layer)
    return expert_layer


def make_of_shared(
    layer: Any, follower: sharing.Follower, activation_bits: int | None
) -> ExpertLayer:
    """The engine's layer for the weights that another process has loaded for vLLM's `layer`.

    `activation_bits` is this process's own setting: the weights are the same for all values of it.
    """
    stored = follower.receive(layer.layer_name)
    stored |= _activation_bits(stored, activation_bits)
    expert_layer = _expert_layer(layer, stored, ordered=True)
    follower.close_with(expert_layer)
    return expert_layer


def _activation_bits(stored: dict[str, Any], wanted: int | None) -> dict[str, int]:
    """The numbers of bits of a layer's activations, for each of its formats."""
    bits = {"activation_bits": preferred_activation_bits(stored["format"], wanted)}
    for name in ("w3", "w2"):
        if format := stored.get(f"{name}_format"):
            bits[f"{name}_activation_bits"] = preferred_activation_bits(format, wanted)
    return bits


def _expert_layer(layer: Any, stored: dict[str, Any], **options: Any) -> ExpertLayer:
    return ExpertLayer(
        **stored,
        **activations.arguments(layer.moe_config),
        apply_router_weight_on_input=layer.apply_router_weight_on_input,
        **options,
    )
