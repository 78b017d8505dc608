"""What a checkpoint's config.json says of how its experts are quantised."""

import re
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any

__all__ = ["only_4_bit"]

# Of the names that families give a routed expert's projection, enough to be recognised by.
EXPERTS = (
    "model.layers.{}.mlp.experts.0.down_proj",
    "model.language_model.layers.{}.mlp.experts.0.down_proj",
    "model.layers.{}.block_sparse_moe.experts.0.w2",
)
# Where formats list what is not quantised, or is in another way.
EXCEPTIONS = (
    "ignore",
    "ignored_layers",
    "modules_to_not_convert",
    "exclude_modules",
    "dynamic",
    "extra_config",
)


def only_4_bit(
    quantization: Mapping[str, Any], layers: Collection[int], groups: Collection[int]
) -> bool:
    """Whether all routed experts are stored in 4 bits, in what the engine computes as it is.

    Args:
        quantization: quantization_config of config.json.
        layers: those that have experts.
        groups: sizes of which an integer group must be a multiple of one.
    """
    for name in EXCEPTIONS:
        for entry in quantization.get(name) or ():
            if any(_matches(entry, expert.format(layer)) for expert in EXPERTS for layer in layers):
                return False
    parts = [of["weights"] for of in (quantization.get("config_groups") or {}).values()]
    return all(_is_4_bit(part, groups) for part in parts or [quantization])


def _is_4_bit(part: Mapping[str, Any], groups: Collection[int]) -> bool:
    if "FP4" in str(part.get("quant_algo", "")) or "mxfp4" in str(part.get("quant_method", "")):
        return True
    if part.get("bits", part.get("num_bits")) != 4:
        return False
    size = part.get("group_size")
    if part.get("type") == "float" or size in (None, -1):
        return True
    ordered = part.get("desc_act") or part.get("actorder") in ("group", "dynamic")
    return not ordered and any(size % group == 0 for group in groups)


def _matches(entry: str, name: str) -> bool:
    """Whether an entry, a name or a pattern in any format's way of writing, means this module."""
    pattern = entry.removeprefix("re:").removeprefix("-:").removeprefix("+:")
    if pattern != entry:
        return re.match(pattern, name) is not None
    return entry == name or name.startswith(f"{entry}.") or fnmatchcase(name, entry)
