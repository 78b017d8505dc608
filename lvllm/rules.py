"""Ordered rules from patterns to values: of all patterns that match a name, the first one counts.

A user writes them as a list, in YAML or JSON:

    - 'layers\\.[0-3]\\.': KEEP
    - '.*': INT4
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    RootModel,
    ValidationError,
    model_serializer,
    model_validator,
)

from lvllm import patterns

__all__ = ["Rule", "Rules", "first_fault"]

Value = TypeVar("Value")


class Rule(BaseModel, Generic[Value]):
    """A regular expression, which may match any part of a name, and its value."""

    model_config = ConfigDict(frozen=True)

    pattern: str
    value: Value

    @model_validator(mode="before")
    @classmethod
    def _of_a_pair(cls, written: Any) -> Any:
        if not isinstance(written, Mapping) or len(written) != 1:
            raise ValueError(f"{written!r} is not one pattern with its value")
        ((pattern, value),) = written.items()
        if not isinstance(pattern, str):
            raise ValueError(f"{pattern!r} is no text: write patterns in quotes")
        patterns.check(pattern)
        return {"pattern": pattern, "value": value}

    @model_serializer
    def _pair(self) -> dict[str, Any]:
        return {self.pattern: self.value}


class Rules(RootModel[tuple[Rule[Value], ...]], Generic[Value]):
    """Rules in their order."""

    model_config = ConfigDict(frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _of_a_list(cls, written: Any) -> Any:
        if not isinstance(written, list | tuple) or not written:
            raise ValueError(f"{written!r} is no list of rules such as - '.*': VALUE")
        return written

    def __iter__(self) -> Iterator[Rule[Value]]:  # type: ignore[override]
        return iter(self.root)

    def __str__(self) -> str:
        return ", ".join(f"'{rule.pattern}': {rule.value}" for rule in self.root)

    def of(self, name: str) -> Value | None:
        """The value of the first rule that matches `name`; None if no rule matches.

        Raises PatternError for an expression that `without_effect` refuses.
        """
        rule = self.rule_of(name)
        return None if rule is None else rule.value

    def rule_of(self, name: str) -> Rule[Value] | None:
        """The first rule that matches `name`; None if no rule matches."""
        return next((rule for rule in self.root if patterns.occurs(rule.pattern, name)), None)

    def without_effect(self, names: Iterable[str]) -> str | None:
        """One line about the first rule that is the first for none of `names`; None: each is.

        The line may also be about an expression that takes too long.
        """
        try:
            return self._without_effect(list(names))
        except patterns.PatternError as error:
            return str(error)

    def _without_effect(self, names: list[str]) -> str | None:
        used = {id(self.rule_of(name)) for name in names}
        for rule in self.root:
            if id(rule) in used:
                continue
            if any(patterns.occurs(rule.pattern, name) for name in names):
                return f"'{rule.pattern}' comes too late: rules before it match all that it matches"
            return f"'{rule.pattern}' matches nothing"
        return None


def first_fault(error: ValidationError) -> str:
    """One line about the first fault of a list of rules."""
    fault = error.errors()[0]
    match [part for part in fault["loc"] if part != "value"]:
        case [int(number), *where]:
            rule = f"rule {number + 1}: "
        case where:
            rule = ""
    said = fault["msg"].removeprefix("Value error, ")
    if fault["type"] != "value_error":
        name = "".join(f"{part}=" for part in where[-1:])
        said = f"{name}{fault['input']!r}: {said}"
    return " ".join(f"{rule}{said}".split())
