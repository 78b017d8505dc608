"""Which experts of which layers the tokens go to."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from lvllm.top.scrape import Scrape, TopError

__all__ = ["Hot", "Routing", "routing"]

SHADES = " ░▒▓█"
"""From no tokens at all to at least four times the average of the layer."""


@dataclass(frozen=True)
class Hot:
    """An expert that gets more tokens than the others of its layer."""

    layer: str
    expert: str
    share: float
    """Its share of the layer's tokens."""
    times: float
    """How many times the average of the layer's experts."""


@dataclass(frozen=True)
class Routing:
    """The tokens of each expert of each layer since the server's start."""

    layers: dict[str, dict[str, float]]
    """By layer and expert, in the order of their numbers."""

    def hottest(self, most: int) -> list[Hot]:
        """The experts with the largest multiples of their layer's average."""
        found = []
        for layer, experts in self.layers.items():
            total = sum(experts.values())
            for expert, tokens in experts.items():
                if total and tokens:
                    share = tokens / total
                    found.append(Hot(layer, expert, share, share * len(experts)))
        return sorted(found, key=lambda hot: -hot.times)[:most]

    def picture(self, width: int, height: int | None = None) -> list[tuple[str, str]]:
        """A row for each layer, with its name: a shade for each expert, or for some of them.

        With more experts than `width`, neighbours share a shade, and so do layers with `height`.
        """
        rows = []
        for names in _groups(list(self.layers), height or len(self.layers)):
            shades = [_relative(list(self.layers[name].values()), width) for name in names]
            size = min(len(one) for one in shades)
            mixed = [sum(one[at] for one in shades) / len(shades) for at in range(size)]
            name = names[0] if len(names) == 1 else f"{names[0]}-{names[-1]}"
            rows.append((name, "".join(_shade(value) for value in mixed)))
        return rows


def routing(found: Scrape) -> Routing:
    """The routing of the model's own layers. Raises TopError if the server does not tell it."""
    tokens = found.by("class", "layer", "expert", name="lvllm_routed_tokens_total")
    if not tokens:
        raise TopError(
            "the server does not tell the tokens of experts: start it with LVLLM_METRICS_EXPERTS=1"
        )
    layers: dict[str, dict[str, float]] = {}
    for (kind, layer, expert), value in sorted(tokens.items(), key=lambda one: _order(one[0])):
        name = f"{kind} {layer}" if kind == "draft" else layer
        layers.setdefault(name, {})[expert] = value
    return Routing(layers)


def _order(key: tuple[str, ...]) -> tuple[tuple[bool, int, str], ...]:
    """Numbers by their value, before other names. The model's layers come before a draft's."""
    kind, *numbers = key
    return (
        (kind == "draft", 0, ""),
        *((not text.isdigit(), int(text) if text.isdigit() else 0, text) for text in numbers),
    )


def _groups(names: Sequence[str], most: int) -> list[Sequence[str]]:
    """The names in their order, in at most so many groups of nearly equal size."""
    count = max(1, min(most, len(names)))
    bounds = [len(names) * at // count for at in range(count + 1)]
    return [names[begin:end] for begin, end in pairwise(bounds)]


def _relative(tokens: Sequence[float], width: int) -> list[float]:
    """The tokens of each expert, or group of experts, relative to the layer's average."""
    average = sum(tokens) / len(tokens)
    count = min(width, len(tokens))
    bounds = [len(tokens) * at // count for at in range(count + 1)]
    return [
        sum(tokens[begin:end]) / (end - begin) / average if average else 0.0
        for begin, end in pairwise(bounds)
    ]


def _shade(times: float) -> str:
    """ " " for nothing, then up to half the average, twice the average, four times, and more."""
    bounds = (0.0, 0.5, 2.0, 4.0)
    return SHADES[sum(times > bound for bound in bounds)]
