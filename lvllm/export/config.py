"""What config.json says of an exported checkpoint: which modules have which format."""

import re
from collections.abc import Iterable, Mapping, Set
from typing import Any

from lvllm.export.schemes import Format, Scheme
from lvllm.export.selection import is_expert, with_merged

__all__ = ["patterns", "quantization_config"]

LAYER = re.compile(r"(?:(?P<model>.*)\.)?layers\.(?P<number>\d{1,9})\.(?P<rest>.+)")
EXPERT = re.compile(r"experts\\\.\d+\\\.")
DRAFT = re.compile(r"(.*\.)?mtp\.")
OF_DRAFTS = r"(.*\.)?mtp\.(.*\.)?"


def quantization_config(
    formats: Mapping[str, Format], schemes: Mapping[Format, Scheme], left: Set[str]
) -> dict[str, Any]:
    """The section `quantization_config`, in compressed-tensors' form.

    Args:
        formats: the format of each module that is quantised.
        schemes: how these formats are stored.
        left: the modules that are not quantised.
    """
    # transformers takes the experts' format from the first group that says "experts", which
    # `shared_experts` does, too.
    order = sorted(formats, key=lambda module: (not is_expert(module), module))
    groups = list(dict.fromkeys(formats[module] for module in order))
    alike = len(groups) == 1
    drafts = any(DRAFT.match(module) for module in (*formats, *left))

    def targets(format: Format) -> list[str]:
        names = {module for module, one in formats.items() if one == format}
        experts = set(filter(is_expert, names))
        return patterns(experts.union(with_merged(names - experts)), drafts)

    # There may be thousands of experts. Other modules are named in full, because their names tell
    # those of a vision tower from those of the language model.
    experts = set(filter(is_expert, left))
    return {
        "quant_method": "compressed-tensors",
        "format": schemes[groups[0]].format if alike else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": schemes[format].group(["Linear"] if alike else targets(format))
            for number, format in enumerate(groups)
        },
        "ignore": sorted([*patterns(experts, drafts), *with_merged(left - experts)]),
        "kv_cache_scheme": None,
    }


def patterns(modules: Iterable[str], drafts: bool) -> list[str]:
    """Regular expressions, after `re:`, that match these modules of a model's layers.

    They say nothing of what is before `layers.`, since transformers and vLLM have different names
    for it. But a layer of drafts (multi-token prediction) may have the number of another layer:
    `drafts` says whether there are some. A module outside the layers is named as it is.
    """
    layers: dict[tuple[str, str], set[int]] = {}
    found = set()
    for name in modules:
        if (match := LAYER.fullmatch(name)) is None:
            found.add(name)
            continue
        model = rf"(?!{OF_DRAFTS})(.*\.)?" if drafts else r"(.*\.)?"
        if DRAFT.match(name):
            model = OF_DRAFTS
        rest = EXPERT.sub(r"experts\\.\\d+\\.", re.escape(match["rest"]))
        layers.setdefault((model, rest), set()).add(int(match["number"]))
    for (model, rest), numbers in layers.items():
        found.add(rf"re:{model}layers\.({'|'.join(map(str, sorted(numbers)))})\.{rest}$")
    return sorted(found)
