"""The file of `lvllm export --dtype-config`: which modules get which format.

It is YAML, a list of rules from a regular expression to a format:

    - 'layers\\.0\\..*experts': fp8
    - '\\.experts\\.': {format: int4, group_size: 64}
    - 'self_attn': int8

The expressions are looked for in the names of modules as the checkpoint has them.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

from pydantic import ValidationError

from lvllm import documents
from lvllm.errors import readable
from lvllm.export import selection
from lvllm.export.schemes import KEEP, Format
from lvllm.export.tensorfile import ExportError
from lvllm.rules import Rules, first_fault

__all__ = ["FormatRules", "chosen", "read"]

FormatRules = Rules[Format]


def read(path: Path) -> FormatRules:
    """The rules of a file. Raises ExportError in one line."""
    where = f"--dtype-config {readable(str(path))}"
    try:
        return FormatRules.model_validate(documents.read(path))
    except documents.DocumentError as error:
        raise ExportError(f"{where}: {error}") from None
    except ValidationError as error:
        raise ExportError(f"{where}: {first_fault(error)}") from None


def chosen(
    rules: FormatRules, quantizable: Collection[str], modules: Collection[str]
) -> Mapping[str, Format]:
    """The format of each module of `quantizable` that is not to stay as it is.

    `modules` are all modules of the checkpoint. Raises ExportError for a rule without effect, and
    if modules that vLLM loads into one matrix would get different formats.
    """
    if (fault := rules.without_effect(modules)) is not None:
        raise ExportError(f"--dtype-config: {fault}; a module's name is {min(quantizable)}")
    kept = Format(format=KEEP)
    found = {name: rules.of(name) or kept for name in sorted(quantizable)}
    others = sorted(set(modules) - found.keys())
    for rule in rules:
        if rule.value.format == KEEP or any(rules.rule_of(name) is rule for name in found):
            continue
        never = next(name for name in others if rules.rule_of(name) is rule)
        raise ExportError(
            f"--dtype-config: '{rule.pattern}' matches only what is never quantised, such as"
            f" {never}"
        )
    first: dict[str, str] = {}
    for name, how in found.items():
        whole = selection.one_matrix(name)
        other = first.setdefault(whole, name)
        if found[other] != how:
            raise ExportError(
                f"--dtype-config: {other}: {found[other]}, {name}: {how}; vLLM loads both"
                " together, in one format"
            )
    formats = {name: how for name, how in found.items() if how.format != KEEP}
    if not formats:
        raise ExportError("--dtype-config keeps all modules as they are: there is nothing to do")
    return formats
