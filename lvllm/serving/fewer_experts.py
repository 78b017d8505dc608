"""Fewer experts for each token than the model was trained with.

Every token then reads and multiplies fewer weights, and answers become worse: docs/serve.md has
numbers. vLLM has the means, since it lets the values of config.json be replaced.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lvllm.planning.errors import PlanError
from lvllm.planning.shape import CHOSEN, ModelShape

__all__ = ["override", "with_fewer"]


def override(config: Mapping[str, Any], where: str, count: int) -> str:
    """What `vllm serve --hf-overrides` is told so that a token takes `count` experts.

    `config` is the model's config.json, and `where` names it.

    Raises PlanError if it does not say how many a token takes, or if `count` is not below that.
    """
    text = config.get("text_config")
    for section, outer in ((text, "text_config"), (config, None)):
        if not isinstance(section, Mapping):
            continue
        for key in CHOSEN:
            trained = section.get(key)
            if not isinstance(trained, int):
                continue
            if not 1 <= count <= trained:
                raise PlanError(f"--experts-per-token {count}: allowed are 1 to {trained}")
            found: dict[str, Any] = {key: count}
            return json.dumps(found if outer is None else {outer: found})
    raise PlanError(f"--experts-per-token {count}: {where} has none of {', '.join(CHOSEN)}")


def with_fewer(model: ModelShape, count: int) -> ModelShape:
    """The shape of the model whose tokens take `count` experts."""
    layers = (replace(x, chosen=min(x.chosen, count)) for x in model.layers)
    return replace(model, layers=tuple(layers))
