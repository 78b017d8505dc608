"""Which tensors of a checkpoint are quantised. Their names decide."""

import re
from collections.abc import Iterable

from lvllm.export.tensorfile import ExportError, Tensor

__all__ = ["ignored", "module", "quantized"]

EXPERT = re.compile(r"\.experts\.\d+\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight$")
"""A projection of one expert, as most families name it (w1, w2 and w3: Mixtral, MiniMax)."""
LAYER = re.compile(r"(^|\.)layers\.\d+\.")
LINEARS = re.compile(
    r"\.([qkvo]|qkv|out)_proj$"  # attention
    r"|\.(q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj)$"  # latent attention
    r"|\.in_proj_(qkv|z|qkvz)$"  # linear attention
    r"|\.((gate|up|gate_up|down)_proj|w1|w2|w3)$"  # dense layers, shared experts
)
OTHERS = re.compile(r"visual|vision|audio|indexer")
"""Parts of a model whose linear layers are never quantised."""
MERGED = (("gate_proj", "up_proj", "gate_up_proj"), ("q_proj", "k_proj", "qkv_proj"))
"""Two modules that vLLM merges, and the name of the merged one."""
FLOATS = ("BF16", "F16", "F32")


def quantized(tensors: Iterable[Tensor], linears: bool, architecture: str) -> set[str]:
    """Names of the experts' weights, and with `linears` also of the layers' other linear weights.

    Raises ExportError, in one line that names a tensor, if there are no experts, or if they are
    stored in a way that cannot be quantised.
    """
    tensors = list(tensors)
    experts = {tensor.name: tensor for tensor in tensors if EXPERT.search(tensor.name)}
    unknown = [
        tensor
        for tensor in tensors
        if "experts." in tensor.name
        and "shared_expert" not in tensor.name
        and len(tensor.shape) > 1
        and tensor.name not in experts
    ]
    if unknown:
        first = max(unknown, key=lambda tensor: len(tensor.shape))
        name, shape = first.name, list(first.shape)
        if len(shape) > 2:
            raise ExportError(
                f"{architecture} has all experts in one tensor, {name} {shape}; with such tensors,"
                " exported are Qwen3-VL-MoE, Qwen3.5-MoE and Gemma 4"
            )
        raise ExportError(
            f"{architecture} names experts, {name} {shape}; exported are models with tensors like"
            " experts.0.gate_proj.weight, up_proj and down_proj, or w1, w3 and w2"
        )
    if not experts:
        raise ExportError(f"{architecture} has no experts: there is nothing to quantise")
    chosen = list(experts.values())
    if linears:
        chosen += [tensor for tensor in tensors if tensor.name not in experts and _linear(tensor)]
    for tensor in chosen:
        if tensor.dtype not in FLOATS or len(tensor.shape) != 2:
            raise ExportError(
                f"{tensor.name} is {tensor.dtype} {list(tensor.shape)}: a matrix in"
                f" {', '.join(FLOATS)} is wanted"
            )
    return {tensor.name for tensor in chosen}


def ignored(tensors: Iterable[Tensor], chosen: set[str]) -> list[str]:
    """Names of modules that have a matrix and are not quantised.

    Other tools look modules up by these names, but vLLM looks for its merged modules in two cases.
    It asks for gate_up_proj, since the dense layers of Qwen3-MoE tell it too late that gate and up
    are merged there. It asks for qkv_proj, since some layers of Gemma 4 have no v and vLLM takes k
    for it. `lm_head` is always listed: it has no tensor where it shares the embeddings' weight.
    """
    names = {
        module(tensor.name)
        for tensor in tensors
        if len(tensor.shape) > 1
        and tensor.name.endswith(".weight")
        and tensor.name not in chosen
        and "embed_tokens" not in tensor.name
    }
    merged = {
        f"{stem}.{whole}"
        for one, other, whole in MERGED
        for stem in (name.removesuffix(f".{one}") for name in names if name.endswith(f".{one}"))
        if f"{stem}.{other}" in names
    }
    return sorted(names | merged | {"lm_head"})


def module(name: str) -> str:
    """The module that a weight belongs to."""
    return name.removesuffix(".weight")


def _linear(tensor: Tensor) -> bool:
    if not tensor.name.endswith(".weight") or len(tensor.shape) != 2:
        return False
    stem = module(tensor.name)
    return (
        LINEARS.search(stem) is not None
        and LAYER.search(stem) is not None
        and OTHERS.search(stem) is None
    )
