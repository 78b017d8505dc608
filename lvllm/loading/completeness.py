"""Weights outside the experts that a checkpoint does not have.

vLLM compares the names of what was loaded with a model's parameters, but leaves out the modules
that have a quantisation method, which all linear layers and embeddings do. Their memory starts with
whatever it held, so that a model without some of these weights starts and answers with noise. Here
the first weight of each of their rows starts as NaN, and none may be NaN after loading. The same
holds for the biases that decide which experts a token takes.
"""

from collections.abc import Callable

import torch
from torch.nn import Module
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from lvllm.checkpoint.headers import CheckpointError

__all__ = ["load_all_rows", "require_names"]

PLAIN = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)
ROUTER_BIAS = "e_score_correction_bias"


def require_names(model: Module, loaded: set[str] | None) -> None:
    """Raise CheckpointError if a parameter of `model` is not among the names that were `loaded`.

    Parameters of modules with a quantisation method are left out, because a checkpoint need not
    have all of them. A model that does not report what it loaded (None) is not checked.
    """
    if loaded is None:
        return
    left_out = tuple(
        f"{name}."
        for name, module in model.named_modules()
        if getattr(module, "quant_method", None) is not None
    )
    missing = sorted(
        name
        for name, _ in model.named_parameters()
        if name not in loaded and not name.startswith(left_out)
    )
    if missing:
        more = f", nor are {len(missing) - 1} others" if len(missing) > 1 else ""
        raise CheckpointError(f"{missing[0]} is not in the checkpoint{more}")


def load_all_rows(load: Callable[[], None], model: Module, made_up: str | None = None) -> None:
    """Have `load` fill `model`, all rows of its linear layers, embeddings and routers included.

    A module called `made_up` is left out, because the checkpoint need not have it.

    Raises CheckpointError, with the weight's name, if a row was not loaded. A row that begins with
    NaN in the checkpoint is refused as well.
    """
    for _, firsts in _first_weights(model, made_up):
        firsts.fill_(torch.nan)
    load()
    for name, firsts in _first_weights(
        model, made_up
    ):  # loading may have replaced a parameter's memory
        missing = firsts.isnan().nonzero().flatten().tolist()
        if missing:
            raise CheckpointError(
                f"{name} is not in the checkpoint, or NaN: {len(missing)} of its {len(firsts)}"
                f" rows, the first is {missing[0]}"
            )


def _first_weights(model: Module, made_up: str | None) -> list[tuple[str, torch.Tensor]]:
    """The name of every unquantised matrix, and a view of the first weight of each of its rows.

    A router's bias has one weight in each of its rows.
    """
    found = [
        (name, bias.data.flatten())
        for name, bias in model.named_parameters()
        if name.endswith(ROUTER_BIAS)
    ]
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or weight.numel() == 0 or not weight.is_floating_point():
            continue
        if made_up is not None and name.rpartition(".")[2] == made_up:
            continue
        if isinstance(getattr(module, "quant_method", None), PLAIN):
            found.append((f"{name}.weight", weight.data.flatten(1)[:, 0]))
    return found
