"""Which tensors of a checkpoint are quantised. Their names decide."""

import re
from collections.abc import Container, Iterable, Set

from lvllm.export.tensorfile import ExportError, Tensor

__all__ = ["check", "is_expert", "left", "module", "one_matrix", "quantizable", "with_merged"]

EXPERT = re.compile(r"\.experts\.\d+\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight$")
"""A projection of one expert, as most families name it (w1, w2 and w3: Mixtral, MiniMax)."""
EXPERTS = re.compile(r".*\.experts(?=\.\d+\.)")
"""The name of all routed experts of a layer, in the name of a projection."""
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
ONE_MATRIX = (
    {"q_proj", "k_proj", "v_proj"},
    {"gate_proj", "up_proj"},
    {"w1", "w3"},
    {"q_a_proj", "kv_a_proj_with_mqa"},
    {"in_proj_qkv", "in_proj_z"},
)
"""Modules of one parent that vLLM loads into one matrix."""
FLOATS = ("BF16", "F16", "F32")


def quantizable(tensors: Iterable[Tensor], linears: bool, architecture: str) -> dict[str, Tensor]:
    """The experts' weights by name, and with `linears` also the layers' other linear weights.

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
    others = (tensor for tensor in tensors if tensor.name not in experts and _linear(tensor))
    return experts | ({tensor.name: tensor for tensor in others} if linears else {})


def check(tensor: Tensor) -> None:
    """Raise ExportError for a tensor that is no matrix of floating-point numbers."""
    if tensor.dtype not in FLOATS or len(tensor.shape) != 2:
        raise ExportError(
            f"{tensor.name} is {tensor.dtype} {list(tensor.shape)}: a matrix in"
            f" {', '.join(FLOATS)} is wanted"
        )


def left(tensors: Iterable[Tensor], chosen: Container[str]) -> set[str]:
    """Names of modules that have a matrix and are not quantised.

    `lm_head` is always among them: it has no tensor where it shares the embeddings' weight.
    """
    return {"lm_head"} | {
        module(tensor.name)
        for tensor in tensors
        if len(tensor.shape) > 1
        and tensor.name.endswith(".weight")
        and tensor.name not in chosen
        and "embed_tokens" not in tensor.name
    }


def with_merged(names: Set[str]) -> list[str]:
    """The names of modules, sorted, with those that vLLM has for merged ones.

    Other tools look modules up by these names, but vLLM looks for its merged modules in two cases.
    It asks for gate_up_proj, since the dense layers of Qwen3-MoE tell it too late that gate and up
    are merged there. It asks for qkv_proj, since some layers of Gemma 4 have no v and vLLM takes k
    for it.
    """
    merged = {
        f"{stem}.{whole}"
        for one, other, whole in MERGED
        for stem in (name.removesuffix(f".{one}") for name in names if name.endswith(f".{one}"))
        if f"{stem}.{other}" in names
    }
    return sorted(names | merged)


def is_expert(name: str) -> bool:
    """Whether a module of this name is a projection of a routed expert."""
    return EXPERTS.match(name) is not None


def one_matrix(name: str) -> str:
    """What the module `name` shares with the modules that vLLM loads into one matrix with it."""
    if found := EXPERTS.match(name):
        return found[0]
    parent, _, last = name.rpartition(".")
    return next((f"{parent}.{'/'.join(sorted(one))}" for one in ONE_MATRIX if last in one), name)


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
