"""Experts of GPTQ checkpoints: codes packed along the inputs, act-order in g_idx."""

from typing import Any

from lvllm.formats import integers, packing
from lvllm.formats.base import ExpertFormat
from lvllm.formats.descriptor import Descriptor, Section, Stored
from lvllm.formats.transposed import Repack, TransposedInts
from lvllm.formats.unquantized import Unquantized

__all__ = ["DESCRIPTOR", "find", "gptq"]


def _stored(section: Section, module: str) -> Stored:
    return integers.stored(
        section.get("bits") or 8,
        section.get("group_size"),
        symmetric=bool(section.get("sym", True)),
        act_order=bool(section.get("desc_act")),
    )


DESCRIPTOR = Descriptor(
    "GPTQ",
    stored=_stored,
    quantizations=("gptq", "auto_gptq"),
    quant_methods=("gptq",),
    exceptions=("dynamic",),
    scales=("scales",),
)


def find(quant_config: Any, layer: Any, prefix: str) -> ExpertFormat | None:
    """Experts of a GPTQ checkpoint; those that it leaves alone are not quantised."""
    if not DESCRIPTOR.describes(quant_config):
        return None
    from vllm.model_executor.layers.quantization.utils.gptq_utils import get_dynamic_override

    module = f"{prefix}.0.{layer.ckpt_down_proj_name}"
    # The list is given, or vLLM has read it from the checkpoint's files.
    quantized = [name for name in quant_config.modules_in_block_to_quantize if ".experts." in name]
    listed = not quantized or any(name in module for name in quantized)
    if not listed or get_dynamic_override(quant_config, layer_name=module) is False:
        return Unquantized()

    def override(key: str, default: Any) -> Any:
        return get_dynamic_override(quant_config, module, key, default)

    bits = override("bits", quant_config.weight_bits)
    if bits not in (4, 8):
        raise ValueError(f"{prefix}: experts of {bits} bits are not supported; 4 and 8 are")
    return gptq(
        bits,
        override("group_size", quant_config.group_size),
        symmetric=override("sym", quant_config.is_sym),
        act_order=override("desc_act", quant_config.desc_act),
        v2=quant_config.full_config.get("checkpoint_format") == "gptq_v2",
    )


def gptq(bits: int, group_size: int, *, symmetric: bool, act_order: bool, v2: bool) -> ExpertFormat:
    """Experts in GPTQ's packing; `v2` is how zero points are stored (`packing.gptq_zero`)."""
    unpack_zeros = packing.gptq_zero if bits == 4 else packing.gptq_zero8
    repack_zeros: Repack = lambda qzeros: unpack_zeros(qzeros, v2)  # noqa: E731
    return TransposedInts(
        bits,
        group_size,
        packed_along_rows=False,
        repack=packing.gptq_int4 if bits == 4 else packing.gptq_int8,
        repack_zeros=None if symmetric else repack_zeros,
        act_order=act_order,
    )
