"""Rules for layers: LVLLM_MOE_USE_WEIGHT, and the file of `lvllm export --dtype-config`.

They are read, and then asked about the modules of a small model.
"""

from lvllm.export import dtype_config
from lvllm.settings.resolving import resolve
from lvllm.settings.use_weight import LayerFormats
from tests.fuzz.rules import ask
from tests.fuzz.scratch import scratch_folder

LAYERS = [f"model.layers.{n}.mlp.experts" for n in (0, 1, 10)]
EXPERTS = [
    f"{layer}.{expert}.{name}_proj"
    for layer in LAYERS
    for expert in (0, 1)
    for name in ("gate", "up", "down")
]
LINEARS = [f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"]
OTHERS = ["lm_head", "model.layers.0.mlp.gate", "model.visual.blocks.0.attn.qkv"]


def one_input(data: bytes) -> None:
    value = data.decode(errors="surrogateescape")
    if (settings := ask(resolve, {"LVLLM_MOE_USE_WEIGHT": value}, None)) is not None:
        rules = settings["moe_use_weight"].value
        if rules is not None and rules.without_effect(LAYERS) is None:
            LayerFormats.by_rules(rules, LAYERS)
    with scratch_folder() as folder:
        path = folder / "rules.yaml"
        path.write_bytes(data)
        formats = ask(dtype_config.read, path)
        if formats is not None:
            ask(dtype_config.chosen, formats, EXPERTS + LINEARS, EXPERTS + LINEARS + OTHERS)
