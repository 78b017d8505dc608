"""LVLLM_MOE_USE_WEIGHT: the number format of experts in memory, for all layers or by rules."""

import re
from collections.abc import Iterable
from enum import StrEnum
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from lvllm import documents
from lvllm.rules import Rules, first_fault

__all__ = ["LayerFormats", "UseWeight", "UseWeights", "WrongRules"]

ALL = ".*"


class UseWeight(StrEnum):
    """The number format that a layer's experts have in memory, relative to the checkpoint."""

    TO_DTYPE = "TO_DTYPE"
    KEEP = "KEEP"
    INT4 = "INT4"
    INT8 = "INT8"
    FP8 = "FP8"


class WrongRules(ValueError):
    """Rules that are not allowed; the text says why."""


class UseWeights(Rules[UseWeight]):
    """The setting: a format for layers by the names of their experts."""

    @classmethod
    def parse(cls, written: object) -> Self:
        """One format for all layers, or rules: a list, or the text of one in YAML or JSON.

        Raises WrongRules for rules, and ValueError for anything else.
        """
        if isinstance(written, str) and not written.startswith("["):
            return cls.model_validate([{ALL: UseWeight(written)}])
        try:
            rules = documents.parse(written) if isinstance(written, str) else written
        except documents.DocumentError as error:
            raise WrongRules(str(error)) from None
        if not isinstance(rules, list):
            raise ValueError
        try:
            return cls.model_validate(rules)
        except ValidationError as error:
            raise WrongRules(first_fault(error)) from None

    @property
    def everywhere(self) -> UseWeight | None:
        """The format of all layers; None if rules say it."""
        return self.root[0].value if [rule.pattern for rule in self] == [ALL] else None

    def __str__(self) -> str:
        return self.everywhere or super().__str__()


class LayerFormats(BaseModel):
    """The setting as the front process has resolved it for a model.

    Layers go by their numbers, because vLLM gives the modules of some families other names than
    their checkpoints do.
    """

    model_config = ConfigDict(frozen=True)

    others: UseWeight = UseWeight.KEEP
    """The format of all layers that are not listed."""
    layers: tuple[tuple[str, UseWeight], ...] = ()

    @classmethod
    def by_rules(cls, rules: UseWeights, names: Iterable[str]) -> Self:
        """The formats of the layers whose experts have these names."""
        found = ((_key(name), rules.of(name)) for name in names)
        return cls(layers=tuple((key, use) for key, use in found if use is not None))

    def of(self, name: str) -> UseWeight:
        """The format of the experts that vLLM or the checkpoint calls `name`."""
        return dict(self.layers).get(_key(name), self.others)


def _key(name: str) -> str:
    """The number of a layer, with a mark for layers of drafts that are numbered on their own."""
    # `lvllm doctor` reads the settings where PyTorch is missing, which lvllm.checkpoint needs.
    from lvllm.checkpoint.moe_layers import layer_number

    draft = re.match(r"(.*\.)?mtp\.", name) is not None
    return f"{'mtp.' if draft else ''}{layer_number(name)}"
