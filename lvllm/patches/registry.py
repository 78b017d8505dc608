"""The one place where LvLLM replaces something of vLLM, transformers or PyTorch at run time.

A module of this package declares each of its replacements above the function that makes it:

    @patch(
        "vllm.lora.model_manager:get_supported_lora_modules",
        signature="(model)",
        why="...",
        upstream="none, because ...",
        until="...",
    )
    def leave_out_experts(original):
        def get_supported_lora_modules(model): ...
        return get_supported_lora_modules

Declaring imports nothing of vLLM, since the target is text: `lvllm env --patches` lists all of them
without vLLM. Installing looks the target up, and ends the start unless it is what the replacement
was written against. So a new vLLM is never patched blindly.
"""

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from lvllm.errors import LvllmError
from lvllm.supported import VLLM

__all__ = ["Patch", "PatchError", "Unless", "install", "patch", "patches"]

AT_START = "at the start of every process"
MODEL_LOADED = "in a CPU worker, once the model is loaded"
IN_GPU_WORKER = "in a GPU worker, before the model is loaded"
PICTURE_MODEL_IMPORTED = "once a model for pictures is imported"
ON_RAY = "in an engine whose ranks are on a Ray cluster"
NOTHING = "nothing"
"""The signature of a target that does not exist and is added."""

_MISSING = object()


class PatchError(LvllmError):
    """A target is not what its replacement was written against."""


@dataclass(frozen=True)
class Unless:
    """A condition under which there is no gap, so that nothing is replaced."""

    text: str
    holds: Callable[[], bool]


@dataclass(frozen=True)
class Patch:
    """One attribute of a foreign module or class, and what takes its place.

    Attributes:
        target: "package.module:Class.attribute".
        signature: what must be found there: the parameters of a function as `inspect.signature`
            writes them, without annotations; the name of the type of any other value; `NOTHING`.
        also: signatures in other releases, which the replacement fits as well.
        why: the gap that the replacement fills.
        upstream: the issue or pull request about it, or "none, because ...".
        until: when the replacement can go.
        checked: the releases of the target's package in which the target was looked up.
        platform: "cpu", or None for every platform.
        when: the moment at which it is installed.
        unless: where there is no gap.
        make: returns the replacement, given the original.
    """

    target: str
    signature: str
    also: tuple[str, ...]
    why: str
    upstream: str
    until: str
    checked: tuple[str, ...]
    platform: str | None
    when: str
    unless: Unless | None
    make: Callable[[Any], Any]
    _made: list[Any] = field(default_factory=list, repr=False)

    @property
    def package(self) -> str:
        """The package whose attribute is replaced: "vllm", "transformers" or Python's "sys"."""
        return self.target.partition(":")[0].partition(".")[0]

    def install(self) -> None:
        """Put the replacement into the target's place, unless it is there already.

        Raises PatchError if the target is missing or has another signature.
        """
        if self.unless is not None and self.unless.holds():
            return
        owner, name = self._owner()
        found = _look_up(owner, name)
        if self._is_replacement(found):
            return
        self.check()
        kind = type(found) if isinstance(found, staticmethod | classmethod) else _as_it_is
        original = getattr(found, "__func__", found)
        replacement = self.make(None if found is _MISSING else original)
        if inspect.isfunction(original) and inspect.isfunction(replacement):
            functools.update_wrapper(replacement, original)
        self._made.append(replacement)
        setattr(owner, name, kind(replacement))

    def check(self) -> None:
        """Raise PatchError unless the target has the signature that was written against."""
        found = describe(_look_up(*self._owner()))
        if found not in (self.signature, *self.also):
            raise self._refuse(found)

    def is_installed(self) -> bool:
        """Whether the replacement is in the target's place in this process."""
        return self._is_replacement(_look_up(*self._owner()))

    def _is_replacement(self, value: Any) -> bool:
        # Another plugin may have wrapped ours.
        value = getattr(value, "__func__", value)
        while value is not None:
            if any(value is made for made in self._made):
                return True
            value = getattr(value, "__wrapped__", None) if inspect.isfunction(value) else None
        return False

    def _owner(self) -> tuple[Any, str]:
        """The module or class that has the target, and the target's name in it."""
        module, _, path = self.target.partition(":")
        *owners, name = path.split(".")
        try:
            owner: Any = importlib.import_module(module)
            for part in owners:
                owner = getattr(owner, part)
        except (ImportError, AttributeError):
            raise self._refuse(NOTHING) from None
        return owner, name

    def _refuse(self, found: str) -> PatchError:
        version = getattr(sys.modules.get(self.package), "__version__", "of unknown version")
        return PatchError(
            f"cannot replace {self.target}: expected {self.signature}, found {found}"
            f" ({self.package} {version}; checked with {self.checked[0]} to {self.checked[-1]});"
            " unset LVLLM_MOE_NUMA_ENABLED for stock vLLM"
        )


_patches: dict[str, Patch] = {}


def patch(
    target: str,
    *,
    signature: str,
    also: tuple[str, ...] = (),
    why: str,
    upstream: str,
    until: str,
    checked: tuple[str, ...] = VLLM,
    platform: str | None = None,
    when: str = AT_START,
    unless: Unless | None = None,
) -> Callable[[Callable[[Any], Any]], Patch]:
    """Declare that the decorated function makes the replacement of `target`; see `Patch`."""

    def declare(make: Callable[[Any], Any]) -> Patch:
        declared = Patch(
            target, signature, also, why, upstream, until, checked, platform, when, unless, make
        )
        if target in _patches:
            raise ValueError(f"{target} is declared twice")
        _patches[target] = declared
        return declared

    return declare


def patches() -> Iterator[Patch]:
    """All that were declared, in that order."""
    yield from _patches.values()


def install(platform: str, when: str = AT_START) -> None:
    """Install what is for this platform, "cpu" or "cuda", and this moment.

    Raises PatchError.
    """
    for declared in patches():
        if declared.when == when and declared.platform in (None, platform):
            declared.install()


def describe(value: Any) -> str:
    """What stands in a place, as `Patch.signature` has it."""
    if value is _MISSING:
        return NOTHING
    value = getattr(value, "__func__", value)
    if not inspect.isfunction(value):
        return type(value).__name__
    signature = inspect.signature(value)
    parameters = [
        parameter.replace(annotation=parameter.empty) for parameter in signature.parameters.values()
    ]
    bare = signature.replace(parameters=parameters, return_annotation=signature.empty)
    return str(bare)


def _look_up(owner: Any, name: str) -> Any:
    if isinstance(owner, type):  # getattr would bind class methods
        return inspect.getattr_static(owner, name, _MISSING)
    return getattr(owner, name, _MISSING)


def _as_it_is(value: Any) -> Any:
    return value
