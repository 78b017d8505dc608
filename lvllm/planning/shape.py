"""The sizes of a model, from its config.json.

transformers builds the model without memory (PyTorch's meta device), which takes 0.2 s for 671
billion weights. So every architecture that transformers knows is counted exactly, by the names and
shapes of its own parameters.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lvllm.checkpoint.headers import Checkpoint
from lvllm.checkpoint.moe_layers import MOST_LAYERS, layer_number
from lvllm.errors import quoted
from lvllm.machine.memory_need import needed
from lvllm.planning import bits
from lvllm.planning.errors import PlanError
from lvllm.planning.gguf_bits import Stored
from lvllm.settings.division import divides_heads, rows_of_expert

__all__ = [
    "CHOSEN",
    "LayerShape",
    "ModelShape",
    "check_experts",
    "of_config",
    "of_folder",
    "read_config",
]

SAME_AS = {"kimi_k2": "deepseek_v3"}
"""Models that are another family's, under a name that transformers does not know."""
UNNAMED = {"LongcatFlashForCausalLM": "longcat_flash"}
"""The type of models whose config.json may name an architecture, but no model_type."""
CHOSEN = ("num_experts_per_tok", "top_k_experts", "moe_topk", "num_experts_per_token")
"""What configurations call the number of experts that a token chooses."""
UNLIMITED = 1 << 60
MOST = 1 << 40
"""The largest number that a configuration may have: sizes of weights are products of a few."""
_ROUTED = re.compile(r"(?:^|\.)experts\.(?:(\d{1,9})\.)?")


@dataclass(frozen=True)
class LayerShape:
    """A decoder layer. Sizes are numbers of weights."""

    number: int
    experts: int
    """How many routed experts it has; 0 if it has none."""
    chosen: int
    """How many of them a token takes, on average where some of its choices have no weights."""
    expert: int
    """Weights of one routed expert."""
    others: int
    """Weights that every token reads: attention, router, shared experts or a dense MLP."""
    cached: int = 0
    """Values that a token keeps in the KV cache."""
    window: int = UNLIMITED
    """How many tokens attention looks back."""
    attended: int = 0
    """Multiplications of a token with each token that attention looks at, while decoding."""
    attended_in_prompts: int = 0
    """The same in prompts."""

    def inner(self, hidden: int) -> float:
        """The width of an expert: gate, up and down have as many weights as this x `hidden`."""
        return self.expert / (3 * hidden)

    def looks(self, back: float) -> float:
        """How many of `back` earlier tokens attention looks at."""
        return min(back, self.window)

    @property
    def routed(self) -> int:
        """Weights of all routed experts."""
        return self.experts * self.expert

    def read(self, tokens: int) -> float:
        """How many routed weights so many tokens read, if they choose independently."""
        return self.routed * (1 - (1 - self.chosen / self.experts) ** tokens)

    def products(self, tokens: int) -> int:
        """How many products so many tokens compute with routed experts."""
        return tokens * self.chosen * self.expert


@dataclass(frozen=True)
class ModelShape:
    """A model. Sizes are numbers of weights."""

    name: str
    layers: tuple[LayerShape, ...]
    hidden: int
    embedding: int
    head: int
    """Weights of the output layer."""
    tied: bool
    """Whether the output layer's weights are those of the embedding."""
    context: int
    """The longest context that the model was made for, in tokens."""
    bits: bits.Bits
    heads: tuple[int, int] | None = None
    """Attention heads and KV heads; None: they are not known, or differ by layer."""
    rows: int | None = None
    """The rows of an expert's gate projection; None as above."""
    stored: Stored | None = None
    """How GGUF files store the experts, for which `bits` are the engine's nearest; None: the model
    is no GGUF file."""

    @property
    def routed(self) -> int:
        """Weights of all routed experts."""
        return sum(layer.routed for layer in self.layers)

    @property
    def others(self) -> int:
        """All weights but the routed experts."""
        ends = self.embedding + (0 if self.tied else self.head)
        return sum(layer.others for layer in self.layers) + ends

    @property
    def active(self) -> int:
        """The weights that one token is multiplied with."""
        return self.head + sum(x.chosen * x.expert + x.others for x in self.layers)

    def attention(self, tokens: int, sequences: int, back: float) -> tuple[float, float]:
        """Attention of `tokens` tokens of `sequences` sequences, each looking back at `back`.

        Returns how many values of the KV cache it reads, and how many products it computes.
        """
        decoding = tokens == sequences
        values = products = 0.0
        for layer in self.layers:
            attended = layer.attended if decoding else layer.attended_in_prompts
            values += sequences * layer.cached * layer.looks(back)
            products += tokens * attended * layer.looks(back)
        return values, products

    @property
    def moe_layers(self) -> tuple[LayerShape, ...]:
        return tuple(layer for layer in self.layers if layer.experts)

    def cards(self, most: int) -> int:
        """How many of up to `most` cards tensor parallelism can divide the model among."""
        return max(size for size in range(1, max(most, 1) + 1) if self._divides(size))

    def _divides(self, size: int) -> bool:
        heads = self.heads is None or divides_heads(*self.heads, size)
        return heads and (self.rows is None or self.rows % size == 0)

    def divides_blocks(self, size: int) -> bool:
        """Whether each of so many cards gets whole blocks of each expert."""
        return self.rows is None or self.rows % (size * self.bits.block) == 0

    def cache_bytes(self, tokens: int) -> int:
        """Bytes of the KV cache for one context of so many tokens, in 16 bits."""
        return int(sum(2 * layer.cached * layer.looks(tokens) for layer in self.layers))


def of_folder(folder: Path, name: str) -> ModelShape:
    """The shape of the model in a folder.

    If its safetensors files are there, the bits of a weight are those that the files have.

    Raises:
        PlanError: see of_config.
        CheckpointError: a safetensors file that cannot be read.
    """
    shape = of_config(read_config(folder), name)
    return _with_files(shape, folder) if any(folder.glob("*.safetensors")) else shape


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json in a folder. Raises PlanError if it is not there, or no JSON object."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise PlanError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{path}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise PlanError(f"{path}: a JSON object is wanted")
    return config


def _with_files(shape: ModelShape, folder: Path) -> ModelShape:
    need = needed(Checkpoint.open(folder).tensors, None, layers=len(shape.layers))
    found = replace(
        shape.bits,
        experts=8 * need.experts / shape.routed,
        others=8 * need.others / shape.others,
    )
    return replace(shape, bits=found)


def of_config(config: Mapping[str, Any], name: str) -> ModelShape:
    """The shape of the model that a config.json describes.

    Raises:
        PlanError: if transformers does not know the model or refuses its config.json, if the
            quantisation is not supported, or if the model has no routed experts.
    """
    kind = _kind(config)
    text, parameters = _parameters(kind, config, name)
    sizes: dict[int, dict[str, torch.Size]] = defaultdict(dict)
    ends: dict[str, int] = {}
    for parameter, size in parameters.items():
        number = layer_number(parameter)
        if number is None:
            ends[parameter] = size.numel()
        else:
            sizes[number][parameter.split(f"layers.{number}.", 1)[1]] = size
    fields = _Fields(text, name)
    layers = tuple(_layer(sizes[i], fields, i) for i in sorted(sizes))
    if not any(layer.experts for layer in layers):
        raise PlanError(f"{name}: the model has no routed experts; stock vLLM serves it")
    check_experts(layers, name)
    embedding = next((n for key, n in ends.items() if "embed_tokens" in key), max(ends.values()))
    section = config.get("quantization_config") or getattr(text, "quantization_config", None)
    return ModelShape(
        name=name,
        layers=layers,
        hidden=fields.number("hidden_size"),
        embedding=embedding,
        head=ends.get("lm_head.weight", embedding),
        tied="lm_head.weight" not in ends,
        context=fields.number("max_position_embeddings", 4096),
        bits=bits.of_section(section),
        heads=_heads(fields),
        rows=rows_of_expert(text),
    )


def _kind(config: Mapping[str, Any]) -> Any:
    """transformers' name for the type of the model; anything else if config.json has none."""
    kind, architectures = config.get("model_type"), config.get("architectures")
    if kind is None and isinstance(architectures, list) and architectures:
        return UNNAMED.get(str(architectures[0]))
    return SAME_AS.get(str(kind), kind)


def _parameters(
    kind: Any, config: Mapping[str, Any], name: str
) -> tuple[Any, dict[str, torch.Size]]:
    """The configuration of the language model, and the shapes of all parameters."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig

    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise PlanError(f"{name}: transformers does not know the model_type {quoted(kind)}")
    plain = {k: v for k, v in config.items() if k not in ("quantization_config", "model_type")}
    # A config.json with values of a wrong type fails somewhere in transformers, with any error.
    try:
        text = CONFIG_MAPPING[kind](**plain).get_text_config()
        if not isinstance(text, PretrainedConfig):
            raise TypeError(f"the language model's part is {quoted(text)}")
        if (layers := getattr(text, "num_hidden_layers", 0)) > MOST_LAYERS:
            raise ValueError(f"{quoted(layers)} layers, of which no model has {MOST_LAYERS}")
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(text)
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        raise PlanError(
            f"{name}: transformers does not build a model of type {kind!r} from its config.json:"
            f" {said}"
        ) from None
    return text, {key: tensor.shape for key, tensor in model.named_parameters()}


def check_experts(layers: Sequence[LayerShape], name: str) -> None:
    """Raise PlanError for experts that have fewer weights than one each."""
    empty = next((layer for layer in layers if layer.experts and not layer.expert), None)
    if empty is not None:
        raise PlanError(f"{name}: the {empty.experts} experts of layer {empty.number} are empty")


class _Fields:
    """The numbers in the configuration of a language model."""

    def __init__(self, config: Any, name: str) -> None:
        self._config = config
        self._name = name

    def number(self, key: str, default: int | None = None, most: int = MOST) -> int:
        """A number from 1 to `most`; `default` for one that is missing or 0. Raises PlanError."""
        value = self.get(key)
        if default is not None and (value is None or value == 0):
            return default
        if type(value) is not int or not 1 <= value <= most:
            raise PlanError(
                f"{self._name}: {key} in config.json is {quoted(value)}, a whole number from 1 to"
                f" {most} is wanted"
            )
        return value

    def get(self, key: str) -> Any:
        return getattr(self._config, key, None)


def _layer(parameters: Mapping[str, torch.Size], config: _Fields, number: int) -> LayerShape:
    experts = routed = others = 0
    # A token may also choose experts that return their input (LongCat-Flash). They have no weights,
    # though transformers makes a gate for each of them, which nobody reads.
    without = config.number("zero_expert_num", 0)
    most = config.number("n_routed_experts") if without else UNLIMITED
    for name, shape in parameters.items():
        if found := _ROUTED.search(name):
            # Most families stack a layer's experts in one tensor; others number them.
            count = int(found[1]) + 1 if found[1] else min(shape[0], most)
            experts = max(experts, count)
            routed += math.prod(shape if found[1] else (count, *shape[1:]))
        else:
            others += math.prod(shape)
    called = next((key for key in CHOSEN if config.get(key)), CHOSEN[0])
    chosen = config.number(called, most=experts + without) if experts else 0
    chosen = max(1, round(chosen * experts / (experts + without))) if without else chosen
    cached, attended, in_prompts = _attention(parameters, config)
    kinds = config.get("layer_types") or config.get("layers_block_type")
    sliding = isinstance(kinds, list) and kinds[number : number + 1] == ["sliding_attention"]
    return LayerShape(
        number=number,
        experts=experts,
        chosen=chosen,
        expert=routed // experts if experts else 0,
        others=others,
        cached=cached,
        window=config.number("sliding_window", UNLIMITED) if sliding else UNLIMITED,
        attended=attended,
        attended_in_prompts=in_prompts,
    )


def _heads(config: _Fields) -> tuple[int, int] | None:
    heads = config.get("num_attention_heads")
    found = heads, config.get("num_key_value_heads") or heads
    return found if all(isinstance(count, int) for count in found) else None


def _attention(parameters: Mapping[str, torch.Size], config: _Fields) -> tuple[int, int, int]:
    """Values of a token in the KV cache, and multiplications with each token looked at.

    The latter are two numbers, of decoding and of prompts. MLA keeps one latent vector for all
    heads (DeepSeek-V2, arXiv 2405.04434): decoding multiplies each head with it twice, and prompts
    turn it into keys and values first.
    """
    rows = {name.split(".")[-2]: shape[0] for name, shape in parameters.items() if "weight" in name}
    heads = config.number("num_attention_heads")
    if "kv_a_proj_with_mqa" in rows:
        # A layer of LongCat-Flash has attention twice.
        times = sum(name.endswith("kv_a_proj_with_mqa.weight") for name in parameters)
        rope, latent = config.number("qk_rope_head_dim"), config.number("kv_lora_rank")
        in_prompts = config.number("qk_nope_head_dim") + rope + config.number("v_head_dim")
        attended = times * heads * (2 * latent + rope)
        return times * rows["kv_a_proj_with_mqa"], attended, times * heads * in_prompts
    if "k_proj" not in rows or any(".linear_attn." in f".{name}" for name in parameters):
        return 0, 0, 0  # Linear attention has a state that does not grow.
    cached = rows["k_proj"] + rows.get("v_proj", rows["k_proj"])
    key_heads = config.number("num_key_value_heads", heads)
    attended = heads * (cached // key_heads)
    return cached, attended, attended
